"""Several engine processes that serve one model, behind the interface of one `EngineProxy`.

KV pages move between them (`moving`): a request that is placed where its prefix is not cached takes the prefix along
from where it is; a replica that leaves gives its latest prefixes to the others. Some replicas may compute prompts only:
a long prompt is computed there, and its pages move to the replica that decodes while later ones are computed.

Each process is supervised by a proxy of its own. The router (`cluster.router`) chooses the replica of each request; it
hears what the replicas' caches gain and lose. A program runs whole on one replica. If a replica dies, requests of which
their readers have seen nothing are sent to another one; the others end with EngineStopped.

One event loop owns the replicas. Not here: the choice (`cluster.router`), one process and its supervision (`proxy`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np

from ramet.errors import ConfigError, EngineStopped, RametError
from ramet.runtime.cache.prefix_log import CacheChanges, prefix_keys
from ramet.runtime.cluster.autoscaler import Autoscaler, Load, ScalingRule
from ramet.runtime.cluster.router import Placement, RoutedRequest, Router, RouterConfig
from ramet.runtime.server.config import MAX_REPLICAS
from ramet.runtime.server.link.moving import Moves, move
from ramet.runtime.server.link.protocol import (
    Abort,
    ErrorInfo,
    ExtendProgram,
    Hello,
    Output,
    ProgramEvent,
    ProvideTool,
    StartProgram,
    Submit,
    new_id,
)
from ramet.runtime.server.link.proxy import EngineProxy, Listener, check_unused
from ramet.runtime.server.link.streams import AnyStream, ReportStream
from ramet.runtime.types import SamplingParams, TokenIds

logger = logging.getLogger(__name__)

_SIGNATURE_BYTES = 512  # of a program's graph: programs that begin alike share prefixes
_LOOK_S = 1.0  # between two looks at the load
_FIRST_TOKEN = SamplingParams(
    temperature=0.0, max_tokens=1, ignore_eos=True
)  # of a prompt computed for another replica

MakeProxy = Callable[[int, Listener], EngineProxy]


@dataclass(slots=True, eq=False)
class _Routed:
    """A request, or a row of a program, and the replica that has it. `command`: of a row, starts this row alone.

    `commands`: to run a program anew, until the model has written something for it; so texts that it states itself
    (`stated`: their nodes) are told only once. `bringing`: its pages, while it waits for them.
    """

    command: Submit | StartProgram
    stream: AnyStream
    placement: Placement | None = None
    failed_on: set[int] = field(default_factory=set)
    has_begun: bool = False
    bringing: asyncio.Task[None] | None = None
    commands: list[ExtendProgram | Abort | ProvideTool] = field(default_factory=list)
    stated: set[int] = field(default_factory=set)

    @property
    def id(self) -> str:
        return self.stream.id

    def stop_bringing(self) -> None:
        if self.bringing is not None:
            self.bringing.cancel()
            self.bringing = None


def _is_lost(error: ErrorInfo | None) -> bool:
    """True if the engine failed, not the request."""
    return error is not None and error.kind == EngineStopped.__name__


class Replicas:
    """Owns the replicas. The methods are those of `EngineProxy`; `scale` and `restart` change them while they serve."""

    def __init__(
        self,
        count: int,
        make_proxy: MakeProxy,
        *,
        make_router: Callable[[RouterConfig], Router] = Router,
        scaling: ScalingRule | None = None,
        drain_s: float = 30.0,
        num_prefill: int = 0,
    ) -> None:
        """make_proxy: makes the proxy of the replica with this number, which reports to the listener.

        All proxies should have the same accounts: limits are then those of all replicas together.
        scaling: how their number follows the load; None: it does not. drain_s: see `scale`, where that rule takes some
        away. num_prefill: further replicas, which compute long prompts and nothing else.
        """
        if not 1 <= count <= MAX_REPLICAS - num_prefill:
            raise ConfigError(f"dp is {count} but must be in [1, {MAX_REPLICAS - num_prefill}]")
        self.num_retries = 0  # requests sent again after their replica died
        self.num_resyncs = 0  # times that a replica was asked for all it holds
        self._make_proxy = make_proxy
        self._make_router = make_router
        self._prefill = range(count, count + num_prefill)  # the numbers of those that compute prompts only
        # Made when the first replica says how large its pages are: of those that answer, and of `_prefill`.
        self._router: Router | None = None
        self._prefill_router: Router | None = None
        self.moves = Moves()
        self._news: dict[int, asyncio.Future[None]] = {}  # done when the cache of this replica has changed
        self._members = {n: make_proxy(n, partial(self.note, n)) for n in range(count + num_prefill)}
        self._in_flight: dict[str, _Routed] = {}
        self._page_size = 16
        self._is_stopping = False
        self._changing = asyncio.Lock()
        self._scaling = scaling
        self._drain_s = drain_s
        self._first_tokens: deque[tuple[float, float]] = deque()  # times, and seconds since the request was placed
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all processes. Returns before they are ready."""
        if self._scaling is not None:
            self._run(self._follow_load(self._scaling))
        await asyncio.gather(*(proxy.start() for proxy in self._members.values()))

    async def wait_ready(self, timeout_s: float | None = None) -> Hello:
        """Wait until all replicas are ready. Raises the error that keeps one from starting, or TimeoutError."""
        hellos = await asyncio.gather(*(proxy.wait_ready(timeout_s) for proxy in self._members.values()))
        return hellos[0]

    async def wait_given_up(self) -> EngineStopped:
        """Wait until no replica is left that is or will be ready. Returns the last one's error."""
        waiting = {n: asyncio.ensure_future(proxy.wait_given_up()) for n, proxy in self._members.items()}
        while True:
            await asyncio.wait(waiting.values(), return_when=asyncio.FIRST_COMPLETED, timeout=1.0)
            for number, proxy in self._members.items():  # replicas come and go
                if number not in waiting:
                    waiting[number] = asyncio.ensure_future(proxy.wait_given_up())
            for number in waiting.keys() - self._members.keys():
                waiting.pop(number).cancel()
            if all(future.done() for future in waiting.values()):
                return next(iter(waiting.values())).result()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Wait up to `drain_s` for what is in flight, then end all processes."""
        deadline_s = time.monotonic() + drain_s
        while self._in_flight and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        self._is_stopping = True
        await asyncio.gather(*(proxy.stop() for proxy in self._members.values()))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def kill(self) -> None:
        """End all processes at once. For signal handlers."""
        self._is_stopping = True
        for proxy in self._members.values():
            proxy.kill()

    def fail_in_flight(self) -> None:
        """End everything in flight with an error, because the server shuts down."""
        self._is_stopping = True
        for proxy in self._members.values():
            proxy.fail_in_flight()

    # -- more and fewer ------------------------------------------------------------------------------------------

    async def scale(self, count: int, drain_s: float) -> None:
        """Have `count` replicas. New ones are ready on return; removed ones have ended what they had in flight.

        What a removed replica has not ended after `drain_s` seconds ends with EngineStopped, or is sent elsewhere.
        Raises: ConfigError; the error that keeps a new replica from starting, after it was removed again.
        """
        most = MAX_REPLICAS - len(self._prefill)
        if not 1 <= count <= most:
            raise ConfigError(f"the number of replicas is {count} but must be in [1, {most}]")
        async with self._changing:
            there = self._answering()
            new = [n for n in range(MAX_REPLICAS) if n not in self._members][: max(count - len(there), 0)]
            await asyncio.gather(*(self._add(number) for number in new))
            leaving = self._answering()[count:]
            await asyncio.gather(*(self._remove(number, drain_s) for number in leaving))

    async def _follow_load(self, rule: ScalingRule) -> None:
        """Change the number of replicas as the rule says, for ever."""
        try:
            await self.wait_ready()
        except RametError:  # the server ends, and says why
            return
        scaler = Autoscaler(rule)
        while True:
            await asyncio.sleep(_LOOK_S)
            count, load = len(self._answering()), self.load(rule.up_s)
            wanted = scaler.decide(time.monotonic(), count, load)
            if wanted == count:
                continue
            logger.info("the load asks for %d replicas instead of %d: %s", wanted, count, load)
            start_s = time.monotonic()
            try:
                await self.scale(wanted, self._drain_s)
            except Exception:  # also of the system: it is tried again, after the rule's rest
                logger.exception("there are still %d replicas", len(self._answering()))
            else:
                logger.info("there are %d replicas after %.1f s", wanted, time.monotonic() - start_s)

    def load(self, window_s: float) -> Load:
        """The load now. Times to the first token: of the last `window_s` seconds, and of what still waits for it."""
        now_s = time.monotonic()
        while self._first_tokens and self._first_tokens[0][0] < now_s - window_s:
            self._first_tokens.popleft()
        waiting = (s for s in self._in_flight.values() if not s.has_begun and s.placement is not None)
        times = [now_s - s.placement.placed_s for s in waiting if s.placement is not None]
        times = sorted(times + [seconds for _, seconds in self._first_tokens])
        every = [proxy.stats for proxy in self._proxies() if proxy.stats]
        pages = [(s["num_pages"] - s["num_free_pages"] - s["num_evictable_pages"], s["num_pages"]) for s in every]
        return Load(
            len(self._in_flight),
            sum(stats["num_waiting"] for stats in every),
            max((used / max(all_, 1) for used, all_ in pages), default=0.0),
            times[len(times) * 9 // 10] if times else 0.0,
        )

    async def restart(self, drain_s: float, make_proxy: MakeProxy | None = None) -> None:
        """Restart all replicas, one after the other; the others serve meanwhile.

        make_proxy: makes them from now on, with other settings. If one does not start so, all are again what they were.
        Raises: ConfigError, if there is only one; the error that kept a replica from starting.
        """
        async with self._changing:
            if len(self._answering()) < 2:
                raise ConfigError("there is one replica: nothing would serve while it restarts; scale to 2 first")
            before, self._make_proxy = self._make_proxy, make_proxy or self._make_proxy
            done: list[int] = []
            try:
                for number in sorted(self._members):
                    done.append(number)
                    await self._replace(number, drain_s)
            except RametError:
                self._make_proxy = before
                for number in reversed(done):
                    await self._replace(number, drain_s)
                raise

    async def _replace(self, number: int, drain_s: float) -> None:
        if number in self._members:
            await self._remove(number, drain_s)
        await self._add(number)

    async def _add(self, number: int) -> None:
        proxy = self._make_proxy(number, partial(self.note, number))
        await proxy.start()
        self._members[number] = proxy
        try:
            await proxy.wait_ready()
        except RametError:
            await self._remove(number, 0.0)
            raise

    async def _remove(self, number: int, drain_s: float) -> None:
        proxy, router = self._members[number], self._router_of(number)
        if router is not None and number in router.replicas:
            router.drain(number)
        deadline_s = time.monotonic() + drain_s
        while proxy.num_in_flight and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        try:
            async with asyncio.timeout(drain_s):
                await self._hand_over(number)
        except (RametError, TimeoutError) as error:
            logger.info("replica %d leaves, and some of its prefixes are not cached elsewhere: %s", number, error)
        del self._members[number]
        self.note(number, None)
        await proxy.stop()

    async def _hand_over(self, number: int) -> None:
        """Move the latest prefixes of a drained replica to others, as many as these have free pages for."""
        router, proxy = self._router, self._members[number]
        others = {n: self._members[n] for n in self._answering() if n != number}
        room = {
            n: int(other.stats.get("num_free_pages", other.hello.num_kv_tokens // self._page_size))
            for n, other in others.items()
            if other.hello is not None
        }
        if router is None or number in self._prefill or proxy.hello is None or not any(room.values()):
            return
        chosen: list[tuple[int, str, TokenIds]] = []
        for cache_salt, ids in await proxy.ask("latest_prefixes"):
            tokens = np.asarray(ids, dtype=np.int32)
            keys = prefix_keys(tokens, self._page_size, cache_salt)
            placement = router.place(RoutedRequest(len(tokens), keys), time.monotonic())
            router.finished(placement)
            room[placement.replica] = room.get(placement.replica, 0) - placement.num_lacking // self._page_size
            if room[placement.replica] < 0:
                break
            chosen.append((placement.replica, cache_salt, tokens))
        for replica, cache_salt, tokens in reversed(chosen):  # so the latest are also the last that are evicted there
            await move(proxy, others[replica], tokens, cache_salt, self.moves)

    # -- state ---------------------------------------------------------------------------------------------------

    def _answering(self) -> list[int]:
        """The numbers of the replicas that answer requests: all but those that compute prompts only."""
        return [number for number in sorted(self._members) if number not in self._prefill]

    def _router_of(self, number: int) -> Router | None:
        return self._prefill_router if number in self._prefill else self._router

    def engines(self) -> list[tuple[int | None, EngineProxy]]:
        """Every replica's proxy with its number."""
        return sorted(self._members.items())

    def _proxies(self) -> list[EngineProxy]:
        return [proxy for _, proxy in self.engines()]

    @property
    def hello(self) -> Hello | None:
        """The description of one ready engine; None while no engine is ready."""
        proxies = (self._members[number] for number in self._answering())
        return next((proxy.hello for proxy in proxies if proxy.hello is not None), None)

    @property
    def startup(self) -> dict[str, object]:
        """As `EngineProxy.startup`: ready while one replica is."""
        states = [self._members[number].startup for number in self._answering()]
        ready = [state for state in states if state["ready"]]
        attempts = sum(proxy.num_starts for proxy in self._proxies())
        if not ready:
            return {**states[0], "attempt": attempts}
        stage = "ready" if len(ready) == len(states) else f"{len(ready)} of {len(states)} replicas ready"
        return {**ready[0], "stage": stage, "attempt": attempts}

    @property
    def stats(self) -> dict[str, float]:
        """The sums of all replicas' counters at their last heartbeats; of the longest steps, the longest."""
        return _together([proxy.stats for proxy in self._proxies()])

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_programs(self) -> int:
        return sum(proxy.num_programs for proxy in self._proxies())

    @property
    def num_known_prefixes(self) -> int:
        """Pairs of a cached prefix and a replica that the router knows."""
        return 0 if self._router is None else self._router.index.num_keys

    def health(self, patience_s: float = 20.0) -> str | None:
        """None while one replica is healthy; otherwise the problems of all."""
        problems = [(number, self._members[number].health(patience_s)) for number in self._answering()]
        if any(problem is None for _, problem in problems):
            return None
        return "; ".join(f"replica {number}: {problem}" for number, problem in problems)

    # -- work ----------------------------------------------------------------------------------------------------

    def new_id(self, prefix: str) -> str:
        """Return a new unique id."""
        return new_id(prefix)

    def submit(self, command: Submit, *, is_whole: bool = False) -> ReportStream[Output]:
        """Send a request to the replica that the router chooses. Raises the errors of `EngineProxy.submit`."""
        self._admit([command.id])
        stream: ReportStream[Output] = ReportStream(command.id, self.drop, is_whole=is_whole, passes=self._hear_output)
        routed = _Routed(command, stream)
        self._place(routed)
        self._in_flight[command.id] = routed
        return stream

    def start_program(self, command: StartProgram) -> Sequence[ReportStream[ProgramEvent]]:
        """Send each row of a program to the replica that the router chooses, where it runs whole.

        Returns the stream of each row. Raises the errors of `submit`; nothing runs then.
        """
        names = command.row_ids()
        self._admit(names)
        rows: list[_Routed] = []
        placed: dict[int, list[int]] = {}
        try:
            for number, (name, row) in enumerate(zip(names, command.rows, strict=True)):
                alone = msgspec.structs.replace(command, rows=(row,), numbers=(number,))
                rows.append(_Routed(alone, ReportStream(name, self.drop, passes=self._hear_program)))
                rows[-1].placement = placement = self._choose(rows[-1])
                placed.setdefault(placement.replica, []).append(number)
            for replica, numbers in placed.items():  # one message each: its rows share the graph
                arguments = tuple(command.rows[number] for number in numbers)
                part = msgspec.structs.replace(command, rows=arguments, numbers=tuple(numbers))
                self._members[replica].start_program(part, streams=[rows[number].stream for number in numbers])
                self._in_flight.update((rows[number].id, rows[number]) for number in numbers)
        except RametError:
            for routed in rows:
                if routed.id in self._in_flight:
                    self.drop(routed.id)
                elif routed.placement is not None and self._router is not None:
                    self._router.finished(routed.placement)
            raise
        return [routed.stream for routed in rows]

    def send_to_program(self, command: ExtendProgram | Abort | ProvideTool) -> None:
        """Send a command to a running program. It has no effect if the program has ended."""
        routed = self._in_flight.get(command.id)
        if routed is not None and routed.placement is not None:
            if not routed.has_begun:
                routed.commands.append(command)
            proxy = self._members.get(routed.placement.replica)
            if proxy is not None:
                proxy.send_to_program(command)

    def abort(self, request_id: str) -> bool:
        """Abort by exact id. Its reader gets RequestCancelled. Returns False if this id is not in flight."""
        routed = self._in_flight.get(request_id)
        proxy = None if routed is None or routed.placement is None else self._members.get(routed.placement.replica)
        return proxy is not None and proxy.abort(request_id)

    def in_flight(self) -> list[str]:
        return list(self._in_flight)

    async def ask(self, what: str, timeout_s: float = 10.0) -> Any:  # Any: JSON
        """Ask all ready engines. Numbers are added; otherwise it is the first one's answer. Raises as the proxy's."""
        ready = [proxy for proxy in self._proxies() if proxy.hello is not None]
        if not ready:
            raise EngineStopped(self.health() or "no replica is ready")
        answers = await asyncio.gather(*(proxy.ask(what, timeout_s) for proxy in ready))
        if isinstance(answers[0], dict):
            return _together(answers)
        return sum(answers) if isinstance(answers[0], int) else answers[0]

    def _admit(self, request_ids: Sequence[str]) -> None:
        if self._is_stopping:
            raise EngineStopped("the server is shutting down")
        check_unused(request_ids, self._in_flight)

    def _place(self, routed: _Routed) -> None:
        """Choose a replica and send. Replicas that turn out to have gone are passed over."""
        while True:
            placement = self._choose(routed)
            assert self._router is not None
            proxy = self._members[placement.replica]
            is_held = self._lacks_pages(routed, placement)
            try:
                if isinstance(routed.command, Submit):
                    proxy.submit(routed.command, stream=routed.stream, is_held=is_held)
                else:
                    proxy.start_program(routed.command, streams=[routed.stream])
                    for command in routed.commands:
                        proxy.send_to_program(command)
            except EngineStopped:
                self._router.failed(placement, time.monotonic())
                routed.failed_on.add(placement.replica)
                continue
            except RametError:
                self._router.finished(placement)
                raise
            routed.placement = placement
            if routed.stream.trace is not None:
                where = {"ramet.replica": placement.replica, "ramet.cached_tokens": placement.num_cached}
                routed.stream.trace("route", placement.placed_s, time.monotonic(), where)
            if is_held and isinstance(routed.command, Submit):
                routed.bringing = self._run(self._bring(routed, routed.command, placement, proxy))
            return

    def _lacks_pages(self, routed: _Routed, placement: Placement) -> bool:
        """Whether a request waits for pages from another replica, which has them, or is there to compute them."""
        router, request = self._router, placement.request
        if isinstance(routed.command, StartProgram) or router is None or not request.keys:
            return False
        options = routed.command.options
        if options.score_from is not None or options.adapter:  # scored where they are asked; an adapter's pages stay
            return False
        if self._prefill_router is not None:
            return placement.num_lacking >= router.config.least_moved
        num_moved = placement.num_elsewhere - placement.num_cached
        computing_s = router.computing_s(placement.replica, num_moved)
        return placement.source is not None and self.moves.pays(num_moved, computing_s)

    async def _bring(self, routed: _Routed, command: Submit, placement: Placement, target: EngineProxy) -> None:
        """Let the replica of a held request have its pages, and send it then.

        If that fails, whatever the reason, the replica computes what it lacks.
        """
        start_s = time.monotonic()
        tokens = np.asarray(command.prompt_ids, dtype=np.int32)
        try:
            if self._prefill_router is not None:
                await self._compute_apart(self._prefill_router, placement.request, command, target, tokens)
            elif placement.source in self._members:
                source, tokens = self._members[placement.source], tokens[: placement.num_elsewhere]
                await move(source, target, tokens, command.options.cache_salt, self.moves)
        except (RametError, TimeoutError) as error:
            logger.info("request %s: its replica computes what it lacks: %s", command.id, error)
        finally:
            if routed.stream.trace is not None:
                where = {"ramet.replica": placement.replica}
                routed.stream.trace("move pages", start_s, time.monotonic(), where)
            if routed.placement is placement:  # it has not been sent elsewhere meanwhile
                if command.options.deadline_s is not None:
                    left_s = max(command.options.deadline_s - (time.monotonic() - start_s), 0.0)
                    options = command.options.changed({"deadline_s": left_s})
                    command = msgspec.structs.replace(command, options=options)
                target.send_held(command)

    async def _compute_apart(
        self, router: Router, request: RoutedRequest, command: Submit, target: EngineProxy, tokens: TokenIds
    ) -> None:
        """Have a prompt computed on a replica for prompts, and its pages moved to `target` as they are there."""
        options = command.options.changed({"draft": ""})
        whole = command.prompt_ids[: len(tokens) // self._page_size * self._page_size]
        part = Submit(new_id("prefill"), whole, _FIRST_TOKEN, options=options, client=command.client)
        placement = router.place(request, time.monotonic())
        number, proxy = placement.replica, self._members[placement.replica]
        try:
            stream = proxy.submit(part, is_whole=True, is_counted=False)
            done = asyncio.create_task(stream.collect())
            done.add_done_callback(lambda _: self._tell_news(number))
            try:
                await move(
                    proxy,
                    target,
                    tokens,
                    options.cache_salt,
                    self.moves,
                    lambda: None if done.done() else self._news_of(number),
                )
                await done
            finally:
                stream.close()  # which aborts it, if it is not over
                done.cancel()
                await asyncio.gather(done, return_exceptions=True)
            router.begun(placement, time.monotonic())
        except EngineStopped:
            if proxy.hello is None:
                router.failed(placement, time.monotonic())
            raise
        finally:
            router.finished(placement)

    def _news_of(self, number: int) -> asyncio.Future[None]:
        """A future that is done when the cache of a replica has changed."""
        return self._news.setdefault(number, asyncio.get_running_loop().create_future())

    def _tell_news(self, number: int) -> None:
        news = self._news.pop(number, None)
        if news is not None:
            news.set_result(None)

    def _choose(self, routed: _Routed) -> Placement:
        """Ask the router. Raises EngineStopped with the replicas' own problems."""
        if self._router is None:
            raise EngineStopped(self.health() or "no replica is ready")
        try:
            return self._router.place(self._described(routed.command), time.monotonic(), routed.failed_on)
        except EngineStopped as error:
            problems = self.health()
            raise EngineStopped(str(error) if problems is None else f"{error} ({problems})") from error

    def _described(self, command: Submit | StartProgram) -> RoutedRequest:
        if isinstance(command, StartProgram):
            signature = hashlib.blake2b(command.graph[:_SIGNATURE_BYTES], digest_size=8).hexdigest()
            return RoutedRequest(command.num_tokens()[0], (), f"{command.cache_salt}/{signature}")
        try:
            prompt = np.asarray(command.prompt_ids, dtype=np.int64).astype(np.int32)
        except OverflowError:  # no token has such a number: the engine refuses the request, whichever it is
            prompt = np.empty(0, dtype=np.int32)
        every = 1 if self._router is None else self._router.index.grain
        keys = prefix_keys(prompt, self._page_size, command.options.cache_salt, every)
        return RoutedRequest(max(len(command.prompt_ids), 1), keys, command.options.program_id, every)

    # -- what streams and members say ----------------------------------------------------------------------------

    def _hear_output(self, output: Output) -> bool:
        """Note an increment. Returns whether its reader gets it: not the end of a request that is sent elsewhere."""
        routed = self._in_flight.get(output.id)
        if routed is None:
            return True
        if _is_lost(output.error) and routed.stream.is_untouched and self._send_elsewhere(routed):
            routed.stream.forget()
            routed.has_begun = False
            return False
        if output.is_last:
            self._note_end(routed)
        elif output.token_ids:
            self._note_begun(routed)
        return True

    def _hear_program(self, report: ProgramEvent) -> bool:
        """Note an event. Returns whether its reader gets it: not what a program that runs anew has told before."""
        routed, event = self._in_flight.get(report.id), report.event
        if routed is None:
            return True
        if event is None:
            if _is_lost(report.error) and not routed.has_begun and self._send_elsewhere(routed):
                return False
            self._note_end(routed)
        elif event.kind != "done" or event.usage is not None:
            routed.commands.clear()
            self._note_begun(routed)
        elif not routed.has_begun:
            if event.node in routed.stated:
                return False
            routed.stated.add(event.node)
        return True

    def _send_elsewhere(self, routed: _Routed) -> bool:
        """Send what a replica has lost to another one. Returns False if none can take it."""
        if self._is_stopping or self._router is None:
            return False
        assert routed.placement is not None
        routed.stop_bringing()
        self._router.failed(routed.placement, time.monotonic())
        routed.failed_on.add(routed.placement.replica)
        try:
            self._place(routed)
        except RametError as error:
            logger.warning("request %s is lost: %s", routed.id, error)
            return False
        self.num_retries += 1
        return True

    def _note_begun(self, routed: _Routed) -> None:
        if routed.has_begun:
            return
        routed.has_begun = True
        if self._router is not None and routed.placement is not None:
            now_s = time.monotonic()
            self._router.begun(routed.placement, now_s)
            if self._scaling is not None:
                self._first_tokens.append((now_s, now_s - routed.placement.placed_s))

    def _note_end(self, routed: _Routed) -> None:
        routed.stop_bringing()
        del self._in_flight[routed.id]
        if self._router is not None and routed.placement is not None:
            self._router.finished(routed.placement)

    def drop(self, request_id: str) -> None:
        """Remove the stream of a reader that left, and abort its request in the engine."""
        routed = self._in_flight.get(request_id)
        if routed is not None and routed.placement is not None:
            self._note_end(routed)
            proxy = self._members.get(routed.placement.replica)
            if proxy is not None:
                proxy.drop(request_id)

    def note(self, number: int, report: Hello | CacheChanges | None) -> None:
        """Hear of a replica: it is ready, its cache has changed, or it takes no requests any more (None)."""
        if isinstance(report, Hello) and self._router is None:
            self._page_size = report.page_size
            self._router = self._make_router(RouterConfig(page_size=report.page_size))
            self._prefill_router = Router(self._router.config) if self._prefill else None
        router = self._router_of(number)
        if router is None:
            return
        self._tell_news(number)
        if report is None:
            router.remove(number)
        elif isinstance(report, CacheChanges):
            if not router.apply(number, report):
                self._run(self._resync(number, router))
        elif number in self._members:
            router.add(number, report.num_kv_tokens // report.page_size)
            router.apply(number, CacheChanges(0, is_whole=True))

    async def _resync(self, number: int, router: Router) -> None:
        """Ask a replica for all that it holds, because changes were missed."""
        proxy = self._members.get(number)
        if proxy is None:
            return
        self.num_resyncs += 1
        with contextlib.suppress(RametError, TimeoutError):  # it has ended, or the next changes ask again
            answer = await proxy.ask("whole_cache")
            router.apply(number, CacheChanges(answer["number"], answer["added"], is_whole=True))

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _together(every: list[dict[str, float]]) -> dict[str, float]:
    """The sum of each counter; of the longest times, the longest."""
    found: dict[str, float] = {}
    for one in every:
        for name, value in one.items():
            if name.startswith("longest"):
                found[name] = max(found.get(name, value), value)
            else:
                found[name] = found.get(name, 0.0) + value
    return found
