"""The stock containers, one file each. To add one, write a class here and a line in `CONTAINERS`.

They are in order of preference: `auto` takes the first that holds a model exactly.
"""

from factormix.export.container import Container
from factormix.export.containers.flex_olmo import FlexOlmo
from factormix.export.containers.glm4_moe import Glm4Moe
from factormix.export.containers.granite import Granite
from factormix.export.containers.mixtral import Mixtral
from factormix.export.containers.qwen2_moe import Qwen2Moe
from factormix.export.containers.qwen3_moe import Qwen3Moe

CONTAINERS: dict[str, Container] = {
    container.name: container for container in (Granite(), Mixtral(), Qwen3Moe(), Qwen2Moe(), Glm4Moe(), FlexOlmo())
}
"""The containers by their names for ``--to``."""
