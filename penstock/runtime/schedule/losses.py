"""What goes with a step that died: KV that it and others were to write, and who was to read that."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.runtime.kv.blocks import BlockRef
from penstock.runtime.kv.manager import KvManager
from penstock.runtime.schedule.batch import StepPlan
from penstock.runtime.schedule.request import Request


def withdraw(plan: StepPlan, later: Iterable[StepPlan], kv: KvManager) -> dict[Request, None]:
    """Nobody finds any more what this step, or a later one that builds on it, was to write to blocks of the pool or of
    the host. Returns whose requests have come to nothing, in order."""
    doomed = dict.fromkeys((*plan.requests, *(fork.request for fork in plan.retabled)))
    bad, hosts = set(plan.published), {(group, host) for _, host, group in plan.saved}
    kv.withdraw(plan.published)
    for step in later:
        hosts = _hosts(step, bad, hosts)
        spoiled = {(group, block) for host, block, group in step.restored if (group, host) in hosts}
        lost = {ref for ref in step.published if (ref.group, ref.block) in spoiled}
        readers = [each for each in step.admitted if (bad | lost).intersection(kv.refs(each.slot))]
        doomed |= dict.fromkeys(reader.request for reader in readers)
        refs = {ref for request in doomed if request.slot is not None for ref in kv.refs(request.slot)}
        lost |= refs.intersection(step.published)
        kv.withdraw(lost)
        bad |= lost
    kv.withdraw_hosts(hosts)
    return doomed


def _hosts(step: StepPlan, bad: set[BlockRef], hosts: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """(group, block) of the host that do not hold what they should, once the step's copies to them are made."""
    blocks, saved = {(ref.group, ref.block) for ref in bad}, {(group, host) for _, host, group in step.saved}
    return {(group, host) for block, host, group in step.saved if (group, block) in blocks} | hosts - saved
