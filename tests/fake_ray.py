"""As much of Ray as tokbench uses, in this process: what workers do can be decided call by call, and takes no time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Died(RayError):
    def __str__(self) -> str:
        return "The actor died.\n\tactor_id: 1\nThe actor is dead because its worker process has died."


class FakeRay:
    """on_call: told the number of the actor, counted from 1, and the name of the method, before a call is made; what it
    raises is raised. The last call is answered first, then the first one, and so on."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, on_call: Callable[[int, str], None] = lambda actor, method: None) -> None:
        self.on_call, self.actors, self.late, self.is_first = on_call, 0, set[int](), True

    def remote(self, **resources: float) -> Any:
        def as_actor(kind: type) -> Any:
            return SimpleNamespace(remote=lambda: self._actor(kind()))

        return as_actor

    def _actor(self, own: Any) -> Any:
        self.actors += 1
        number = self.actors

        def method(name: str) -> Any:
            return SimpleNamespace(remote=lambda *given: _Call(self, number, name, lambda: getattr(own, name)(*given)))

        names = ("look", "require_data", "begin", "show")
        return SimpleNamespace(**{name: method(name) for name in names})

    def wait(self, calls: list, num_returns: int = 1, timeout: float | None = None) -> tuple[list, list]:
        there = [call for call in calls if call.actor not in self.late]
        ready = there[:num_returns] if self.is_first else there[-num_returns:]
        self.is_first = not self.is_first
        return ready, [call for call in calls if call not in ready]

    def get(self, call: _Call) -> Any:
        self.on_call(call.actor, call.name)
        try:
            return call.work()
        except Exception as error:
            raise RayTaskError(error) from error


class _Call:
    def __init__(self, ray: FakeRay, actor: int, name: str, work: Callable[[], Any]) -> None:
        self.actor, self.name, self.work = actor, name, work
