"""Rules for endpoints: names, keys, traffic."""

import re
from collections.abc import Iterator

from mptserve.check.document import Document
from mptserve.check.problem import Problem

_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]{1,30}[a-zA-Z0-9]")
NAME_RULE = "3 to 32 letters, digits and dashes, starting with a letter and not ending with a dash"


def check_name(document: Document, key: str, rule: str) -> Iterator[Problem]:
    """Yield a problem if the name breaks Azure's rules (Microsoft's how-to-manage-quotas.md), which the SDK ignores."""
    name = document.get(key)
    if isinstance(name, str) and not _NAME.fullmatch(name):
        yield document.problem((key,), rule, f"{key} `{name}` is not a name that Azure accepts", f"use {NAME_RULE}")


def check_online_endpoint(document: Document) -> Iterator[Problem]:
    """Yield the problems of a managed online endpoint."""
    yield from check_name(document, "name", "endpoint-name")
    yield from _traffic(document)
    yield from _mirror(document)
    identity = document.get("identity")
    if isinstance(identity, dict) and identity.get("type") == "user_assigned":
        named = identity.get("user_assigned_identities") or []
        if not any(isinstance(one, dict) and one.get("resource_id") for one in named):
            yield document.problem(
                ("identity",),
                "identity",
                "user_assigned names no identity",
                "add user_assigned_identities: [{resource_id: …}]",
            )


def check_batch_endpoint(document: Document) -> Iterator[Problem]:
    """Yield the problems of a batch endpoint."""
    yield from check_name(document, "name", "endpoint-name")
    mode = document.get("auth_mode")
    if mode is not None and mode != "aad_token":
        yield document.problem(
            ("auth_mode",), "batch-auth", f"a batch endpoint does not support `{mode}`", "set auth_mode: aad_token"
        )


def _traffic(document: Document) -> Iterator[Problem]:
    traffic = document.get("traffic")
    if not isinstance(traffic, dict) or not all(_whole(share) for share in traffic.values()):
        return  # the SDK reports it
    for name, share in traffic.items():
        if not 0 <= share <= 100:
            yield document.problem(
                ("traffic", name), "traffic", f"{share} % is not between 0 and 100 %", "set 0 to 100"
            )
    if all(0 <= share <= 100 for share in traffic.values()) and sum(traffic.values()) not in (0, 100):
        total = sum(traffic.values())
        yield document.problem(
            ("traffic",),
            "traffic-sum",
            f"the traffic adds up to {total} %, not to 100 %",
            "make it add up to 100, or to 0 for no traffic",
        )


def _mirror(document: Document) -> Iterator[Problem]:
    """Azure mirrors at most 50 % of the traffic, to one deployment that has no live traffic."""
    mirror = document.get("mirror_traffic")
    if not isinstance(mirror, dict):
        return
    if len(mirror) > 1:
        yield document.problem(
            ("mirror_traffic",), "mirror", "only one deployment can receive mirrored traffic", "keep one"
        )
    for name, share in mirror.items():
        if _whole(share) and not 0 <= share <= 50:
            yield document.problem(
                ("mirror_traffic", name),
                "mirror",
                f"{share} % cannot be mirrored",
                "set 50 or less; 10 is usually enough",
            )
        live = document.get("traffic", name, default=0)
        if _whole(live) and live > 0 and _whole(share) and share > 0:
            yield document.problem(
                ("mirror_traffic", name),
                "mirror-live",
                f"`{name}` has {live} % of the traffic and cannot receive mirrored traffic too",
                "remove it from traffic or from mirror_traffic",
            )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
