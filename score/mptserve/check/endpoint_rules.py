"""Rules for endpoints: names, keys, traffic."""

import re
from collections.abc import Iterator

from mptserve.check.document import Document
from mptserve.check.problem import Problem

_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]{1,30}[a-zA-Z0-9]")
NAME_RULE = "3 to 32 letters, digits and dashes, a letter first, no dash last"


def check_name(document: Document, key: str, rule: str) -> Iterator[Problem]:
    """Azure refuses such names only when the file is sent (limits: Microsoft's how-to-manage-quotas.md)."""
    name = document.get(key)
    if isinstance(name, str) and not _NAME.fullmatch(name):
        yield document.problem((key,), rule, f"{key} `{name}` is no name that Azure takes", f"use {NAME_RULE}")


def check_online_endpoint(document: Document) -> Iterator[Problem]:
    """Yield what is wrong with a managed online endpoint."""
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
    """Yield what is wrong with a batch endpoint."""
    yield from check_name(document, "name", "endpoint-name")
    mode = document.get("auth_mode")
    if mode is not None and mode != "aad_token":
        yield document.problem(
            ("auth_mode",), "batch-auth", f"a batch endpoint has no `{mode}`", "set auth_mode: aad_token"
        )


def _traffic(document: Document) -> Iterator[Problem]:
    traffic = document.get("traffic")
    if not isinstance(traffic, dict) or not all(_whole(share) for share in traffic.values()):
        return  # the SDK says so
    for name, share in traffic.items():
        if not 0 <= share <= 100:
            yield document.problem(("traffic", name), "traffic", f"{share} % is no share", "use 0 to 100")
    if traffic and sum(traffic.values()) not in (0, 100):
        total = sum(traffic.values())
        yield document.problem(
            ("traffic",),
            "traffic-sum",
            f"the shares add up to {total} %, the rest would be refused",
            "make it 100, or 0",
        )


def _mirror(document: Document) -> Iterator[Problem]:
    """One shadow deployment, at most half of the traffic, and none that answers callers itself."""
    mirror = document.get("mirror_traffic")
    if not isinstance(mirror, dict):
        return
    if len(mirror) > 1:
        yield document.problem(("mirror_traffic",), "mirror", "only one deployment can get a copy", "name one")
    for name, share in mirror.items():
        if _whole(share) and not 0 <= share <= 50:
            yield document.problem(
                ("mirror_traffic", name), "mirror", f"{share} % cannot be mirrored", "copy 50 % at most; 10 is plenty"
            )
        live = document.get("traffic", name, default=0)
        if _whole(live) and live > 0 and _whole(share) and share > 0:
            yield document.problem(
                ("mirror_traffic", name),
                "mirror-live",
                f"`{name}` cannot answer {live} % of the callers and get a copy as well",
                "take it out of traffic or of mirror_traffic",
            )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
