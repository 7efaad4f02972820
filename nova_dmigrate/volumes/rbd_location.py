# SPDX-License-Identifier: Apache-2.0
"""Where an RBD image is, and as whom it is read: the location of a volume of driver ``rbd``.

As text: ``POOL/[NAMESPACE/]IMAGE[@SNAPSHOT][?id=..&cluster=..&mon_host=..&conf=..&keyring=..]``,
percent-encoded. The options have the names, and the meaning, that Ceph's own programs give them.
No secret is part of it: locations are logged.
"""

import dataclasses
from collections.abc import Iterable
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
    def of_volume(
        cls, name: str, monitors: Iterable[tuple[str, str]], user: str, cluster: str = ""
    ) -> "RbdLocation":
        """As Nova and libvirt tell of it.

        :param name: of the image, unencoded. :param monitors: hosts and ports; no port is empty.
        :raises ValueError: it names no image.
        """
        return dataclasses.replace(
            cls.parse(quote(name, safe="/")),
            user=user,
            cluster=cluster,
            monitors=",".join(_address(host, port) for host, port in monitors),
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


def _address(host: str, port: str) -> str:
    """One monitor; an IPv6 address gets the brackets that it may have or not."""
    bare = host.strip("[]")
    address = f"[{bare}]" if ":" in bare else bare
    return f"{address}:{port}" if port else address
