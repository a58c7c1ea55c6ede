"""One run under way: every step of the plan starts as soon as those it needs have ended, and the answer is saved when
it is whole, whatever the side flows are still doing."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import structlog

from app.flows.call import Call, Means
from app.flows.conditions import outputs_hold
from app.flows.config import ANSWER, Step
from app.flows.past import OWNER_LOST, Past
from app.flows.plan import Decision, heard, routed
from app.flows.run import Failure, Progress, Result, Run
from app.flows.voice import Voice
from app.streams.appending import StreamLost
from app.streams.log import Writer
from app.streams.replicas import Fenced

log = structlog.get_logger(__name__)

_DROPPED = Failure("dropped", "The router decided for another flow.", outcome="cancelled")


class Execution:
    """Bounded by the steps of the plan; the runner bounds its time. `save` stores the answer with its event.

    With a `past` it goes on where another owner was lost: what is over stays so, the rest is asked again.
    """

    def __init__(
        self,
        run: Run,
        writer: Writer,
        *,
        means: Means,
        save: Callable[[Progress], Awaitable[None]],
        past: Past | None = None,
    ) -> None:
        self._run = run
        self._plan = run.plan
        self._writer = writer
        self._means = means
        self._save = save
        self._past = past or Past()
        self._decision = self._past.decision or run.plan.decision
        self._answer = self._past.answer(self._decision.flow)
        self._settled = {name: asyncio.Event() for name in run.plan.needs}
        self._calls: dict[str, Call] = {}
        self._started: list[Progress] = []
        self._outputs: dict[str, str] = {}
        self._stopped: Failure | None = None
        self._unwanted: dict[str, Failure] = {}
        self._parallel = False

    @property
    def abandon_s(self) -> float | None:
        return self._run.chatbot.cancel_when_abandoned_s

    @property
    def answer(self) -> Progress:
        """The answer as far as it has come."""
        said = [progress for progress in self._started if progress.flow == self._decision.flow]
        return said[-1] if said else self._answer

    @property
    def user_id(self) -> str:
        return self._run.stream.user_id

    async def perform(self) -> Result:
        """Run the plan to its end. Raises Fenced or StreamLost where this replica may not write any more."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for step in self._plan.steps.values():
                    tasks.create_task(self._step(step))
        except BaseExceptionGroup as group:
            raise _cause(group) from group
        return Result(self._answer, self._started, "parallel" if self._parallel else "sequential")

    def stop(self, why: Failure, flow: str | None = None) -> list[Call]:
        """End the whole run, or one flow of it; the calls that are ended by it."""
        if flow is None:
            self._stopped = self._stopped or why
        elif flow in self._run.chatbot.flows:
            self._unwanted.setdefault(flow, why)
        calls = [call for name, call in self._calls.items() if flow in (None, name)]
        for call in calls:
            call.stop(why)
        return calls

    # -- steps

    async def _step(self, step: Step) -> None:
        try:
            for needed in self._plan.needs[step.flow]:
                await self._settled[needed].wait()
            if step.flow == ANSWER:
                await self._perform_answer()
            elif self._stopped is None or step.flow in self._past.flows:
                await self._perform_side(step)
        finally:
            self._settled[step.flow].set()

    async def _perform_side(self, step: Step) -> None:
        if step.flow in self._past.flows or outputs_hold(step.when, self._outputs):
            progress = await self._flow(step.flow)
            if progress.failure is None:
                self._outputs[step.flow] = progress.text
            elif step.on_failure == "fail":
                self._answer.error_id = self._answer.error_id or progress.error_id
                self.stop(progress.failure)
        if step.flow == self._plan.router:
            self._route(step.flow)

    async def _perform_answer(self) -> None:
        if self._stopped is None or self._answer.attempts:
            speculative = self._plan.speculative and self._past.decision is None
            self._answer = await (self._speculate() if speculative else self._flow(self._decision.flow))
        if self._stopped is not None and not self._answer.attempts:
            self._answer = replace(self._answer, flow=self._decision.flow, failure=self._stopped)
        self._outputs[ANSWER] = self._answer.text
        if self._answer.shown and not self._past.saved:
            await self._save(self._answer)

    async def _speculate(self) -> Progress:
        """Start the likely answer beside the router; nobody hears it before the router has decided for it."""
        likely = self._call(self._decision.flow, held=True)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._perform(likely))
            assert self._plan.router is not None
            await self._settled[self._plan.router].wait()
            if self._decision.flow == likely.progress.flow:
                likely.voice.release()
            else:
                likely.stop(_DROPPED)
        if self._decision.flow == likely.progress.flow:
            return likely.progress
        if self._stopped is not None:  # what was dropped has not been heard, so it is no answer
            return Progress(self._decision.flow)
        return await self._perform(self._call(self._decision.flow))

    async def _flow(self, name: str) -> Progress:
        """What came of a flow: it is asked, unless it was over before us."""
        progress = self._past.flows.get(name)
        undecided = name == self._plan.router and self._past.decision is None
        if progress is None or name not in self._past.over or undecided:
            return await self._perform(self._call(name))
        self._started.append(progress)
        return progress

    def _route(self, router: str) -> None:
        if (decision := self._past.decision) is not None:
            self._outputs[router] = heard(self._run.chatbot, decision)
        elif self._stopped is None:
            image = bool(self._run.inputs.images)
            self._select(routed(self._run.chatbot, self._outputs.get(router), image=image))

    def _select(self, decision: Decision) -> None:
        self._decision = decision
        told = {"flow": decision.flow, "by": decision.by, "reason": decision.reason}
        self._writer.append("flow_selected", told)

    def _call(self, flow: str, *, held: bool = False) -> Call:
        past, voice = self._past.flows.get(flow), Voice(self._writer, held=held)
        call = Call(self._run, flow, voice=voice, means=self._means, progress=past)
        if past is not None and past.shown and self._run.chatbot.flows[flow].on_break == "fail":
            call.stop(OWNER_LOST)
        self._started.append(call.progress)
        return call

    async def _perform(self, call: Call) -> Progress:
        name = call.progress.flow
        self._calls[name] = call
        if len(self._calls) > 1:
            self._parallel = True
            log.info("parallel_started", flows=list(self._calls))
        if (why := self._stopped or self._unwanted.get(name)) is not None:
            call.stop(why)
        try:
            await call.run(self._outputs)
        finally:
            del self._calls[name]
        return call.progress


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception that matters: being fenced off, else whatever came first."""
    for kind in (Fenced, StreamLost):
        if (found := group.subgroup(kind)) is not None:
            return _first(found)
    return _first(group)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
