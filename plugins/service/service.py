"""A backend around a model in this process: its limits, loading and freeing. Standard library only;
the model is loaded when it is first asked.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.errors import PluginError, bad_request, to_plugin_error
from mlx_onevision.plugins.contract.requests import DescribeRequest, EmbedRequest, GenerateRequest
from mlx_onevision.plugins.contract.results import DescribeResult, EmbedResult, GenerateResult
from mlx_onevision.plugins.contract.streams import Channel, Timer, background
from mlx_onevision.plugins.service.base import Request, RequestQueue, StreamingBackend, closed_error
from mlx_onevision.plugins.service.media_policy import MediaPolicy

UNLOAD_TIMEOUT_SECONDS = 10.0  # seconds that close() waits for a model in use or still loading
FREE_AGAIN_SECONDS = 1.0  # seconds after which freeing is tried again where there was no thread


def model_died() -> PluginError:
    """A new one each time: an exception keeps the frames it went through, and their requests."""
    return PluginError("internal", "what runs the model has died", "start it again")


@dataclass(frozen=True)
class Limits:
    """How much is taken on. For whoever opens the backend; a request cannot widen it.

    active : requests at once. waiting : queued behind them; more are refused as ``busy``.
    timeout : seconds that a request may take, waiting included; its own may be shorter.
    video_timeout : the same for a video that is described, which may last for hours.
    max_tokens : of one answer.
    default_max_tokens : of an answer for which neither the request nor the checkpoint has a limit.
    keep_alive : seconds after the last request when the model is freed; None for never.
    """

    active: int = 8
    waiting: int = 8
    timeout: float | None = 300.0
    video_timeout: float | None = 6 * 3600.0
    max_tokens: int = 4096
    default_max_tokens: int = 256
    keep_alive: float | None = 300.0

    def __post_init__(self) -> None:
        """Raises PluginError for a number out of range."""
        least = {"active": 1, "waiting": 0, "max_tokens": 1, "default_max_tokens": 1}
        for name in (*least, "timeout", "video_timeout", "keep_alive"):
            value, bound = getattr(self, name), least.get(name, 0)
            if value is not None and value < bound:
                raise bad_request(f"the limit {name} is {value}, below {bound}")

    def default_for(self, checkpoint: int | None) -> int:
        """Of an answer whose request has no max_tokens; ``checkpoint`` has its own, or None."""
        return min(checkpoint or self.default_max_tokens, self.max_tokens)


class LoadedModel(Protocol):
    """What a service loads. Called from several threads at once.

    Each call may put events into the channel, looks at ``channel.check`` as it goes, and returns
    its result or raises. It reads media by way of the backend's media policy alone.
    """

    @property
    def healthy(self) -> bool:
        """False once it has died: every request fails at once, those under way too."""
        ...

    def generate(self, request: GenerateRequest, channel: Channel) -> GenerateResult: ...

    def embed(self, request: EmbedRequest, channel: Channel) -> EmbedResult: ...

    def describe_video(self, request: DescribeRequest, channel: Channel) -> DescribeResult: ...

    def close(self) -> None: ...


class ModelKeeper:
    """Keeps a model in memory while it is asked, and a while longer.

    load : makes the model, on a thread of its own.
    keep_alive : seconds without a request after which it is freed; None for never.
    """

    def __init__(self, load: Callable[[], LoadedModel], keep_alive: float | None) -> None:
        background.start()
        self._load, self._keep_alive = load, keep_alive
        self._changed = threading.Condition()
        self.current: LoadedModel | None = None  # to look at, not to use
        self._error: BaseException | None = None
        self._busy = False  # loading or freeing: never both, so that two are never in memory
        self._users = 0
        self._free_when_idle = False
        self._closed = False
        self._timer: Timer | None = None

    def acquire(self, check: Callable[[], None]) -> LoadedModel:
        """The model, loaded if need be. :meth:`release` belongs to it.

        check : raises when it is not wanted any more; see :meth:`wake`.

        Raises what loading raises, to everyone who waited for it; the next one tries again.
        Raises PluginError: when the keeper has been closed, or the system has no thread left.
        """
        with self._changed:
            # Who waits for it counts already: it must not be freed before they have it.
            self._users += 1
            try:
                return self._wait(check)
            except BaseException:
                self._users -= 1
                if not self._users:
                    self._error = None  # it keeps the frames, and the requests, of who got it
                self._settle()
                raise

    def _wait(self, check: Callable[[], None]) -> LoadedModel:
        waited = False
        while True:
            check()
            if self._closed:
                raise closed_error()
            if self.current is not None:
                self._stop_timer()
                return self.current
            if not self._busy:
                if waited and self._error is not None:
                    raise self._error
                # An earlier unload() was about an earlier model.
                self._error, self._free_when_idle = None, False
                try:
                    self._start("mlx-onevision-load", self._run_load)
                except RuntimeError as error:
                    raise to_plugin_error(error) from error
            waited = True
            self._changed.wait()

    def release(self) -> None:
        with self._changed:
            self._users -= 1
            self._settle()

    def unload(self) -> None:
        """Frees the model, also one that is still loading, once nobody uses it or waits for it."""
        with self._changed:
            self._free_when_idle = True
            self._settle()

    def close(self) -> None:
        """As :meth:`unload`, and for good. What is in use, or still loading, is waited for a while,
        and is freed when it ends.
        """
        with self._changed:
            self._closed = self._free_when_idle = True
            self._changed.notify_all()
            self._settle()
            self._changed.wait_for(
                lambda: self.current is None and not self._busy, UNLOAD_TIMEOUT_SECONDS
            )

    def wake(self) -> None:
        """Has those who wait look at their ``check`` again."""
        with self._changed:
            self._changed.notify_all()

    # Under the lock.

    def _settle(self) -> None:
        if self._users or self.current is None:
            return
        if self._free_when_idle or self._keep_alive == 0:
            self._free()
        elif self._keep_alive is not None:
            self._free_after(self._keep_alive)

    def _free_after(self, seconds: float) -> None:
        self._stop_timer()
        timer = background.call_later(seconds, lambda: self._free_if_idle(timer))
        self._timer = timer

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _free(self) -> None:
        self._stop_timer()
        model, self.current = self.current, None
        try:
            self._start("mlx-onevision-free", self._run_free, model)
        except RuntimeError:
            # Not raised: whoever ends a request would get it. The model stays in use meanwhile.
            self.current = model
            self._free_after(FREE_AGAIN_SECONDS)

    def _start(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        """Begins to load or to free. Raises RuntimeError where the system has no thread left."""
        self._busy = True
        try:
            threading.Thread(target=target, args=arguments, name=name, daemon=True).start()
        except RuntimeError:
            self._busy = False
            self._changed.notify_all()
            raise

    # On other threads.

    def _free_if_idle(self, timer: Timer) -> None:
        with self._changed:
            if self._timer is timer and not self._users:
                self._free()

    def _run_load(self) -> None:
        model, failure = None, None
        try:
            model = self._load()
        except BaseException as error:
            failure = error
        with self._changed:
            self.current, self._error, self._busy = model, failure, False
            self._settle()
            self._changed.notify_all()

    def _run_free(self, model: LoadedModel) -> None:
        try:
            model.close()
        finally:
            del model
            with self._changed:
                self._busy = False
                self._changed.notify_all()


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
        self._keeper = ModelKeeper(load, self.limits.keep_alive)
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

    def load(self) -> None:
        """Loads the model now. Raises PluginError when that cannot be done."""
        try:
            self._keeper.acquire(lambda: None)
        except Exception as error:
            raise to_plugin_error(error) from error
        self._keeper.release()

    def unload(self) -> None:
        self._keeper.unload()

    def close(self) -> None:
        super().close()
        self._keeper.close()

    def _check(self, request: Request) -> None:
        if self._has_died(self._keeper.current):
            raise model_died()
        if not isinstance(request, EmbedRequest):
            self.policy.check_frames(request.num_frames)
            asked, most = request.max_tokens or 1, self.limits.max_tokens
            if asked > most:
                raise bad_request(f"max_tokens is {asked}", f"{most} are allowed here")

    def _time_limit(self, request: Request) -> float | None:
        described = isinstance(request, DescribeRequest)
        return self.limits.video_timeout if described else self.limits.timeout

    def _serve(self, request: Request, channel: Channel) -> results.Result:
        if self._has_died(self._keeper.current):
            raise model_died()
        if self._keeper.current is None:
            channel.put(results.ProgressEvent("loading"))
        channel.at_end(self._keeper.wake)
        model = self._keeper.acquire(channel.check)
        try:
            if isinstance(request, GenerateRequest):
                return model.generate(request, channel)
            if isinstance(request, EmbedRequest):
                return model.embed(request, channel)
            return model.describe_video(request, channel)
        finally:
            self._has_died(model)
            del model  # else this frame would keep it in memory after it was freed
            self._keeper.release()

    def _has_died(self, model: LoadedModel | None) -> bool:
        """Once true, stays true, even after the dead model was unloaded."""
        self._dead = self._dead or (model is not None and not model.healthy)
        return self._dead
