"""The surroundings of a run on attributes: prepared data, the frozen backbone, who is in a group.

Read once by the driver; actors get from it what is theirs. It must not know where actors are.
"""

from fellray.platform.adaptation import Layout
from fellray.platform.click_data import ClickData
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.fedpa import Fedpa, group_clients


class AttributeWorld:
    """A run's fixed surroundings: prepared data, the frozen backbone, who is in which group."""

    def __init__(self, config: RunConfig):
        """Raises: FellrayError: the data is not prepared, was prepared with other attributes, a
        gate does not fit the layers, or no group has enough members."""
        assert isinstance(config.method, Fedpa)
        assert config.attributes is not None
        data = ClickData(config.data.path)
        self.clients = data.clients
        self.backbone = data.backbone()
        self.manifest = data.manifest
        self.data_sha256 = data.sha256
        self.sizes = data.sizes()
        made_with = data.manifest["attributes"]
        wanted = config.attributes.model_dump(mode="json")
        if changed := sorted(
            k for k in wanted if k != "baseline" and made_with.get(k) != wanted[k]
        ):
            raise FellrayError(
                f"{config.data.path}: was prepared with another attributes.{changed[0]}: run "
                "`fellray prepare` again"
            )
        self.layout = Layout(self.backbone.shape, config.method)
        least = config.method.min_group_size
        if config.method.groups and len(self.clients) < least:
            raise FellrayError(
                f"method.min_group_size is {least}, but there are {len(self.clients)} clients: no "
                "group can have as many members; lower it"
            )
        codes, values = data.users(), {}
        for at, feature in enumerate(data.user_features):
            if feature.name in config.method.groups:
                values[feature.name] = [feature.values[c] for c in codes[:, at].tolist()]
        self.groups = group_clients({g: values[g] for g in config.method.groups}, least)
        """Attribute -> the group of each client."""
