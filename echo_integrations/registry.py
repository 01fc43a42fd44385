"""The backbones of this process: each loaded once, shared by everyone who asks for the same one. Runs none of them."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from typing import Any

import torch

from echo_integrations.backbone import Backbone, BackboneSpec, load


class Registry:
    """The backbones of this process, each with the objects that use it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start with nothing loaded and nobody waiting."""
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # one load at a time: transformers changes global state meanwhile
        self._backbones: dict[BackboneSpec, Backbone] = {}
        self._users: dict[BackboneSpec, weakref.WeakValueDictionary[int, Any]] = {}

    def acquire(self, spec: BackboneSpec, user: object) -> Backbone:
        """The backbone for a spec, loaded at the first request; ``user`` is counted until it releases or dies."""
        if backbone := self._join(spec, user):
            return backbone
        with self._loading:
            if backbone := self._join(spec, user):
                return backbone
            backbone = load(spec)
            with self._lock:
                self._backbones[spec] = backbone
                self._users[spec] = weakref.WeakValueDictionary({id(user): user})
            return backbone

    def _join(self, spec: BackboneSpec, user: object) -> Backbone | None:
        with self._lock:
            if spec in self._backbones:
                self._users[spec][id(user)] = user
            return self._backbones.get(spec)

    def release(self, user: object) -> None:
        """Count ``user`` out everywhere; a backbone's last user to go frees its memory.

        A user that is garbage-collected is counted out as well, but frees nothing: Chroma builds its embedding
        functions anew for every query, and the model must outlive them. A pass under way ends first.
        """
        gc.collect()  # users that refer to themselves are gone only then
        with self._lock:
            for spec, users in list(self._users.items()):
                if users.pop(id(user), None) is not None and not users:
                    del self._backbones[spec], self._users[spec]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def loaded(self) -> list[BackboneSpec]:
        """What is in memory now."""
        return list(self._backbones)


registry = Registry()

if hasattr(os, "register_at_fork"):  # a child owns none of its parent's locks or GPU contexts: it loads anew when asked
    os.register_at_fork(after_in_child=registry.forget)
