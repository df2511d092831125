"""Online endpoints and their deployments, as things that run: instances, traffic, keys, the count of open requests."""

import asyncio
import secrets
from dataclasses import dataclass, field

from local_azure.instances import Instance, StartFailed
from local_azure.spec import Spec


@dataclass
class Deployment:
    """A deployment that answers. Its instances are replaced as a whole by an update, once the new ones are ready."""

    name: str
    spec: Spec
    instances: list[Instance] = field(default_factory=list)
    starting: list[Instance] = field(default_factory=list)
    in_flight: int = 0
    last_words: str = ""
    deleted: bool = False

    async def pick(self) -> Instance:
        """Return the ready instance with the fewest open requests; wait while none is ready."""
        while not (ready := [i for i in self.instances if i.ready.is_set()]):
            waiters = [asyncio.create_task(i.ready.wait()) for i in self.instances]
            try:
                if waiters:
                    await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(0.05)
            finally:
                for waiter in waiters:
                    waiter.cancel()
        return min(ready, key=lambda i: i.in_flight)

    async def replace(self, spec: Spec, instances: list[Instance]) -> None:
        """Start `instances`, send requests to them, end the old ones. Raises StartFailed, and changes nothing then."""
        self.starting = instances
        try:
            await asyncio.gather(*(i.start() for i in instances))
        except BaseException:
            await asyncio.gather(*(i.stop() for i in instances))
            raise
        finally:
            self.starting = []
        if self.deleted:
            await asyncio.gather(*(i.stop() for i in instances))
            raise StartFailed("it was deleted meanwhile")
        old, self.instances, self.spec = self.instances, instances, spec
        await asyncio.gather(*(i.stop() for i in old))

    async def stop(self) -> None:
        """End every instance, also one that is just starting; for good."""
        self.deleted = True
        old, self.instances = self.instances + self.starting, []
        await asyncio.gather(*(i.stop() for i in old))

    def log(self, n_lines: int) -> str:
        """Return the last lines of every instance, or of the one that did not start."""
        return (
            "\n".join(line for i in self.instances + self.starting for line in list(i.lines)[-n_lines:])
            or self.last_words
        )


@dataclass
class Endpoint:
    """What the front end knows of an endpoint."""

    name: str
    auth_mode: str
    traffic: dict[str, int] = field(default_factory=dict)
    mirror_traffic: dict[str, int] = field(default_factory=dict)
    deployments: dict[str, Deployment] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=lambda: {"primary": new_key(), "secondary": new_key()})
    tokens: set[str] = field(default_factory=set)


def new_key() -> str:
    return secrets.token_urlsafe(24)
