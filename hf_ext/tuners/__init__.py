"""PEFT types: one folder per method. Importing `hf_ext` registers all of them with PEFT."""

from __future__ import annotations


def register() -> dict[str, bool]:
    """Register our types with PEFT; calling it again changes nothing.

    Returns:
        Type names, each with whether PEFT now builds our implementation. False means that the installed PEFT ships a
        type of the same name, which then stays in place (a warning says so).
    """
    from hf_ext._compat import allow_hotswap, extend_peft_type, register_tuner

    # The member comes first: a configuration names it as soon as it is made.
    extend_peft_type("ROSELORA")
    from hf_ext.tuners.roselora import RoseLoraConfig, RoseLoraModel

    ours = {"ROSELORA": register_tuner("ROSELORA", RoseLoraConfig, RoseLoraModel, prefix="lora_")}
    for name, is_ours in ours.items():
        if is_ours:
            allow_hotswap(name)
    return ours
