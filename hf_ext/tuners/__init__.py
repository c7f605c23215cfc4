"""PEFT types: one folder per method. Importing `hf_ext` registers all of them with PEFT."""

from __future__ import annotations


def register() -> dict[str, bool]:
    """Register our types with PEFT; calling it again changes nothing.

    Returns:
        Type names, each with whether PEFT now builds our implementation. False means that the installed PEFT ships a
        type of the same name, which then stays in place (a warning says so).
    """
    from hf_ext._compat import allow_hotswap, extend_peft_type, register_tuner

    # The members come first: a configuration names its own as soon as it is made.
    for name in ("ROSELORA", "NEAT", "BAFT", "LORVP"):
        extend_peft_type(name)
    from hf_ext.tuners.baft import BaftConfig, BaftModel
    from hf_ext.tuners.lorvp import LorVpConfig, LorVpModel
    from hf_ext.tuners.neat import NeatConfig, NeatModel
    from hf_ext.tuners.roselora import RoseLoraConfig, RoseLoraModel

    ours = {
        "ROSELORA": register_tuner("ROSELORA", RoseLoraConfig, RoseLoraModel, prefix="lora_"),
        "NEAT": register_tuner("NEAT", NeatConfig, NeatModel, prefix="peanut_"),
        "BAFT": register_tuner("BAFT", BaftConfig, BaftModel, prefix="baft_"),
        "LORVP": register_tuner("LORVP", LorVpConfig, LorVpModel, prefix="lorvp_"),
    }
    if ours["ROSELORA"]:
        allow_hotswap("ROSELORA")
    return ours
