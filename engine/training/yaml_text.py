"""YAML as recipes and `--set` are written: exponents are numbers, a key stands once."""

import re
from typing import Any

from speeder_engine.errors import ConfigError, MissingDependency, shown

EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


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

    try:
        return _numbered(yaml.load(text, Loader))
    except (yaml.YAMLError, ValueError) as error:  # the latter: no such number or date
        raise ConfigError(f"{where}: no valid YAML: {' '.join(str(error).split())}") from None


def _numbered(value: Any) -> Any:
    """What YAML has read, where 1e-3 is a word, with such words as numbers."""
    if isinstance(value, dict):
        return {key: _numbered(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbered(each) for each in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value
