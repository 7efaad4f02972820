# SPDX-License-Identifier: Apache-2.0
"""Where an RBD image is, and as whom it is read: the location of a volume of driver ``rbd``.

As text: ``POOL/[NAMESPACE/]IMAGE[@SNAPSHOT][?id=..&cluster=..&mon_host=..&conf=..&keyring=..]``,
percent-encoded. The options have the names, and the meaning, that Ceph's own programs give them.
No secret is part of it: locations are logged.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

_OPTIONS = {
    "id": "user",
    "cluster": "cluster",
    "mon_host": "monitors",
    "conf": "configuration",
    "keyring": "keyring",
}


@dataclasses.dataclass(frozen=True)
class RbdLocation:
    """Empty texts stand for what Ceph takes by itself.

    :ivar user: without ``client.``.
    :ivar cluster: its name, by which its files are found in ``/etc/ceph``.
    :ivar monitors: addresses as in ``mon_host``, separated by commas.
    :ivar configuration, keyring: paths of files.
    """

    pool: str
    image: str
    namespace: str = ""
    snapshot: str = ""
    user: str = ""
    cluster: str = ""
    monitors: str = ""
    configuration: str = ""
    keyring: str = ""

    @classmethod
    def parse(cls, text: str) -> "RbdLocation":
        """:raises ValueError: it is none."""
        path, _, query = text.partition("?")
        name, _, snapshot = path.partition("@")
        parts = name.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise ValueError(f"{path!r} is not POOL/IMAGE or POOL/NAMESPACE/IMAGE")
        pool, *namespace, image = parts
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
        if "/" in options.get("cluster", ""):
            raise ValueError("a cluster's name has no '/'")
        unknown = set(options) - set(_OPTIONS)
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} is no option of an RBD image's location")
        return cls(
            pool=unquote(pool),
            image=unquote(image),
            namespace=unquote("".join(namespace)),
            snapshot=unquote(snapshot),
            **{_OPTIONS[name]: value for name, value in options.items()},
        )

    @classmethod
    def of_connection(cls, data: Mapping[str, Any]) -> "RbdLocation":
        """From the ``data`` of a connection information of Cinder's, or Nova's.

        :raises ValueError: it names no image.
        """
        place = cls.parse(quote(str(data.get("name") or ""), safe="/"))
        hosts, ports = data.get("hosts") or (), data.get("ports") or ()
        return dataclasses.replace(
            place,
            user=str(data.get("auth_username") or "") if data.get("auth_enabled") else "",
            cluster=str(data.get("cluster_name") or ""),
            monitors=",".join(map(_address, hosts, ports)),
        )

    @property
    def name(self) -> str:
        """The image, as Ceph's programs write it."""
        path = "/".join(part for part in (self.pool, self.namespace, self.image) if part)
        return f"{path}@{self.snapshot}" if self.snapshot else path

    def __str__(self) -> str:
        path = "/".join(
            quote(part, safe="") for part in (self.pool, self.namespace, self.image) if part
        )
        snapshot = f"@{quote(self.snapshot, safe='')}" if self.snapshot else ""
        options = {name: getattr(self, field) for name, field in _OPTIONS.items()}
        query = urlencode({name: value for name, value in options.items() if value}, safe="/:,[]")
        return f"{path}{snapshot}{'?' if query else ''}{query}"


def _address(host: object, port: object) -> str:
    """One monitor; an IPv6 address gets the brackets that Nova may have left out."""
    bare = str(host).strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"
