"""Two real processes: data parallel runs prune alike on every rank, sharded ones prune as one process does."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from hf_ext.tuners.roselora import RoseLoraState
from tests.tuners.roselora.conftest import adapter_weights, batch, make_model, train

RANKS = 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _worker(rank: int, job, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    torch.save(job(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Gloo aborts a process that ends in the usual way while one of its threads still talks to the other rank.
    os._exit(0)


def spawn(job, folder) -> list:
    mp.spawn(_worker, args=(job, free_port(), str(folder)), nprocs=RANKS)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(RANKS)]


def _loop(model, rank: int, steps: int = 8) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        rows = batch(step)["input_ids"].chunk(RANKS)[rank]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _data_parallel(rank: int):
    model = make_model()
    _loop(torch.nn.parallel.DistributedDataParallel(model), rank)
    return adapter_weights(model)


def _sharded(rank: int):
    """FSDP2 shards both factors on their first dimension: whole rows of A, pieces of every column of B."""
    model = make_model(freeze_mask=False)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    _loop(model, rank, steps=5)
    middle = RoseLoraState(model).state_dict()
    RoseLoraState(model).load_state_dict(middle)
    again = RoseLoraState(model).state_dict()
    assert all(torch.equal(middle["tensors"][key], again["tensors"][key]) for key in middle["tensors"])
    weights = {n: p.full_tensor() for n, p in model.named_parameters() if "lora_" in n}
    return weights, middle


@pytest.mark.slow
def test_ranks_of_a_data_parallel_run_choose_alike(tmp_path):
    first, second = spawn(_data_parallel, tmp_path)
    single = make_model()
    train(single)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        assert torch.equal(weight == 0, adapter_weights(single)[name] == 0), name


@pytest.mark.slow
def test_sharded_run_equals_one_process(tmp_path):
    (first, state), (second, _) = spawn(_sharded, tmp_path)
    single = make_model(freeze_mask=False)
    train(single, steps=5)
    alone = adapter_weights(single)
    whole = RoseLoraState(single).state_dict()
    assert state["steps"] == whole["steps"] == {"default": 5}
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert torch.equal(weight == 0, alone[name] == 0), name
        torch.testing.assert_close(weight, alone[name], rtol=1e-4, atol=1e-6)
    for key, tensor in state["tensors"].items():
        torch.testing.assert_close(tensor, whole["tensors"][key], rtol=1e-3, atol=1e-8)
