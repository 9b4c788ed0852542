"""Add MixDA to PEFT's closed enum of method types. This is the only place that changes PEFT itself.

It is needed because ``register_peft_method`` accepts only names in `PeftType`, and PEFT has no function to add one.
"""

from __future__ import annotations

from peft import PeftType

NAME = "MIXDA"


def mixda_type() -> PeftType:
    """``PeftType.MIXDA``, added at the first call. It compares, hashes, prints and pickles like the other members."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType[NAME]
