"""A backend around a model in this process: its limits, loading and freeing. Standard library only;
the model is loaded when it is first asked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.errors import PluginError, bad_request, to_plugin_error
from mlx_onevision.plugins.contract.requests import DescribeRequest, EmbedRequest, GenerateRequest
from mlx_onevision.plugins.contract.results import DescribeResult, EmbedResult, GenerateResult
from mlx_onevision.plugins.contract.streams import Channel
from mlx_onevision.plugins.service.base import Request, RequestQueue, StreamingBackend
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.model_keeper import ModelKeeper

DEAD = PluginError("internal", "what runs the model has died", "open the backend again")


@dataclass(frozen=True)
class Limits:
    """How much is taken on. For whoever opens the backend; a request cannot widen it.

    active : requests at once. waiting : queued behind them; more are refused as ``busy``.
    timeout : seconds that a request may take, waiting included; its own may be shorter.
    film_timeout : the same for a video that is described, which may last for hours.
    max_tokens : of one answer.
    default_max_tokens : of an answer for which neither the request nor the checkpoint has a limit.
    keep_alive : seconds after the last request when the model is freed; None for never.
    """

    active: int = 8
    waiting: int = 8
    timeout: float | None = 300.0
    film_timeout: float | None = 6 * 3600.0
    max_tokens: int = 4096
    default_max_tokens: int = 256
    keep_alive: float | None = 300.0

    def __post_init__(self) -> None:
        """Raises PluginError for a number out of range."""
        for name, least in (
            ("active", 1),
            ("waiting", 0),
            ("max_tokens", 1),
            ("default_max_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise bad_request(f"the limit {name} is {getattr(self, name)}, below {least}")
        for name in ("timeout", "film_timeout", "keep_alive"):
            if (getattr(self, name) or 0) < 0:
                raise bad_request(f"the limit {name} is {getattr(self, name)}, below 0")

    def default_for(self, checkpoint: int | None) -> int:
        """Of an answer whose request has no max_tokens; ``checkpoint`` has its own, or None."""
        return min(checkpoint or self.default_max_tokens, self.max_tokens)


class LoadedModel(Protocol):
    """What a service loads. Called from several threads at once.

    Each call may put events into the channel, looks at ``channel.check`` as it goes, and returns
    its result or raises. It reads media by way of ``policy`` alone.
    """

    @property
    def healthy(self) -> bool:
        """False once it has died: every request fails at once, those under way too."""
        ...

    def generate(
        self, request: GenerateRequest, policy: MediaPolicy, channel: Channel
    ) -> GenerateResult: ...

    def embed(
        self, request: EmbedRequest, policy: MediaPolicy, channel: Channel
    ) -> EmbedResult: ...

    def describe_video(
        self, request: DescribeRequest, policy: MediaPolicy, channel: Channel
    ) -> DescribeResult: ...

    def close(self) -> None: ...


class Service(StreamingBackend):
    """A :class:`~mlx_onevision.plugins.interface.Backend`.

    load : makes the model, when it is first asked and again after it was freed.
    describe : what :meth:`info` says, known without loading.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        describe: Callable[[], results.ModelInfo],
        *,
        policy: MediaPolicy | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        super().__init__(policy, RequestQueue(self.limits.active, self.limits.waiting))
        self._describe = describe
        self._keeper: ModelKeeper[LoadedModel] = ModelKeeper(load, self.limits.keep_alive)
        self._dead = False

    def info(self) -> results.ModelInfo:
        """Raises PluginError when the model cannot be found."""
        try:
            known = self._describe()
        except Exception as error:
            raise to_plugin_error(error) from error
        active, waiting = self._queue.counts
        return replace(
            known,
            loaded=self._keeper.current is not None,
            active=active,
            waiting=waiting,
            healthy=known.healthy and not self._has_died(self._keeper.current),
        )

    def unload(self) -> None:
        self._keeper.unload()

    def close(self) -> None:
        super().close()
        self._keeper.close()

    def _check(self, request: Request) -> None:
        if self._has_died(self._keeper.current):
            raise DEAD
        if not isinstance(request, EmbedRequest):
            self.policy.check_frames(request.num_frames)
            asked, most = request.max_tokens or 1, self.limits.max_tokens
            if asked > most:
                raise bad_request(f"max_tokens is {asked}", f"{most} are allowed here")

    def _time_limit(self, request: Request) -> float | None:
        described = isinstance(request, DescribeRequest)
        return self.limits.film_timeout if described else self.limits.timeout

    def _serve(self, request: Request, channel: Channel) -> results.Result:
        if self._has_died(self._keeper.current):
            raise DEAD
        if self._keeper.current is None:
            channel.put(results.ProgressEvent("loading"))
        channel.at_end(self._keeper.wake)
        model = self._keeper.acquire(channel.check)
        try:
            if isinstance(request, GenerateRequest):
                return model.generate(request, self.policy, channel)
            if isinstance(request, EmbedRequest):
                return model.embed(request, self.policy, channel)
            return model.describe_video(request, self.policy, channel)
        finally:
            self._has_died(model)
            del model  # else this frame would keep it in memory after it was freed
            self._keeper.release()

    def _has_died(self, model: LoadedModel | None) -> bool:
        """Once true, stays true, even after the dead model was unloaded."""
        self._dead = self._dead or (model is not None and not model.healthy)
        return self._dead
