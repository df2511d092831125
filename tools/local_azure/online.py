"""Running online endpoints and deployments: instances, traffic, keys, requests in flight."""

import asyncio
import secrets
from dataclasses import dataclass, field

from local_azure.instances import Instance, StartFailed
from local_azure.spec import Spec


@dataclass
class Deployment:
    """A running deployment. An update replaces all instances once the new ones are ready."""

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
        """Start `instances`, route requests to them, stop the old ones. After StartFailed the old ones still run."""
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
            raise StartFailed("the deployment was deleted during its start")
        old, self.instances, self.spec = self.instances, instances, spec
        await asyncio.gather(*(i.stop() for i in old))

    async def stop(self) -> None:
        """Stop every instance for good, also those that are starting."""
        self.deleted = True
        old, self.instances = self.instances + self.starting, []
        await asyncio.gather(*(i.stop() for i in old))

    def log(self, n_lines: int) -> str:
        """Return the last lines of every instance, or the error of a start that failed."""
        return (
            "\n".join(line for i in self.instances + self.starting for line in list(i.lines)[-n_lines:])
            or self.last_words
        )


@dataclass
class Endpoint:
    """An online endpoint, for the front end."""

    name: str
    auth_mode: str
    traffic: dict[str, int] = field(default_factory=dict)
    mirror_traffic: dict[str, int] = field(default_factory=dict)
    deployments: dict[str, Deployment] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=lambda: {"primary": new_key(), "secondary": new_key()})
    tokens: set[str] = field(default_factory=set)


def new_key() -> str:
    return secrets.token_urlsafe(24)
