"""The one place that reaches into PEFT: its method types are a closed enum, and MixDA becomes a member of it.

``register_peft_method`` takes any method whose name is in `PeftType`, and offers no way to put a name there.
"""

from __future__ import annotations

from peft import PeftType

NAME = "MIXDA"


def mixda_type() -> PeftType:
    """``PeftType.MIXDA``, made at the first call; it compares, hashes, prints and pickles like the other members."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType[NAME]
