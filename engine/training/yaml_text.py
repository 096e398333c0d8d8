"""YAML as recipes and `--set` are written: exponents are numbers, a key stands once."""

import re
from typing import Any

from speeder_engine.errors import ConfigError, MissingDependency, shown

# of YAML 1.2: what pyyaml knows wants a point and a sign
EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


def read_yaml(text: str, where: str, needed_for: str) -> Any:
    """What `text` says. ConfigError, with `where` it stands, for what is no YAML or has a key twice; MissingDependency
    without pyyaml, which is `needed_for`."""
    try:
        import yaml
    except ImportError:
        raise MissingDependency("pyyaml", "train", needed_for) from None

    class Loader(yaml.SafeLoader):
        """Refuses what YAML forbids and pyyaml takes: of a key that stands twice the last, silently."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key.value, str):  # a list or mapping: no setting is called that, as is said later
                    continue
                if key.value in seen:
                    problem = f"{shown(key.value)} stands there a second time; leave one of them out"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
            return node

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ConfigError(f"{where}: no valid YAML: too many brackets within one another") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter: no such number or date
        raise ConfigError(f"{where}: no valid YAML: {' '.join(str(error).split())}") from None
