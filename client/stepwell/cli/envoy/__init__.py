"""`stepwell envoy-config`: the configuration of an Envoy in front of replicas.

command.py     the command: its options, and what is refused
bootstrap.py   the configuration as a document: listener, routes, cluster, admin
routing.py     which call goes to which replica, for how long, and what Envoy tries again
descriptors.py the protocol as Envoy wants it, to make JSON of it
_yaml.py       a document as YAML
"""

from stepwell.cli.envoy.command import envoy_config

__all__ = ["envoy_config"]
