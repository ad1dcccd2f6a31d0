"""A machine whose cable is pulled: nothing ends a connection to it, it is only not there any more."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest
from launching import Launch, Launched, weights
from namespaces import LAN, Switch, why_not

from zili.training.checkpoints import list_checkpoints

FIRST, SECOND = "ab"


@pytest.fixture
def switch() -> Iterator[Switch]:
    if why := why_not():
        pytest.skip(why)
    with Switch(FIRST, SECOND) as made:
        yield made


def on_both(launch: Launch, switch: Switch) -> Launched:
    """A run on two machines, of which the first has the root and the lower ranks."""
    run: Launched = launch("training.steps=100000", words=("--machines", "1:2", "--wait", "1"))
    run.environment |= {"GLOO_SOCKET_IFNAME": LAN}
    for machine in (FIRST, SECOND):
        run.begin(machine, words=("--host", switch.host(machine)), inside=switch.inside(machine))
        run.until((run.run / "supervision/root-000001.json").exists)
    run.until(lambda: any("4 processes on 2 machines" in line for line in run.said()), 120)
    run.await_life(run.life(), run.steps() + 3)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("cut", [SECOND, FIRST])
def test_a_machine_that_is_cut_off_is_done_without_until_its_link_is_back(
    launch: Launch, switch: Switch, cut: str
) -> None:
    """The machine with the root goes on. The other one does nothing meanwhile, though it sees the folder."""
    run = on_both(launch, switch)
    life = run.life()
    switch.pull(cut)
    run.until(lambda: run.life() > life and not run.workers(SECOND), 120)
    assert f"machine {SECOND} says nothing for 3 s" in run.said(), run.everything()
    assert f"life {life + 1}: 2 processes on 1 machine" in run.said(), run.everything()
    run.await_life(life + 1, run.steps() + 30)
    assert run.life() == life + 1 and run.workers(FIRST) and not run.workers(SECOND), run.everything()
    newest = list_checkpoints(run.run / "checkpoints")[-1]
    assert len(list(newest.glob("*.safetensors"))) == 2, "none of the old life, which had four processes"
    switch.plug(cut)
    run.until(lambda: any("going on with 2" in line for line in run.said()))
    run.until(lambda: len(run.workers(SECOND)) == 2)
    run.await_life(life + 2, run.steps() + 10)
    run.agents[SECOND].send_signal(signal.SIGINT)
    assert run.codes() == {130}, run.everything()
    assert weights(run.run)


@pytest.mark.slow
def test_a_machine_that_is_cut_off_leaves_the_others_their_root(launch: Launch, switch: Switch) -> None:
    """It sees in the folder that the root lives which it does not reach."""
    run = on_both(launch, switch)
    life = run.life()
    switch.pull(SECOND)
    run.until(lambda: run.life() > life, 120)
    time.sleep(15)  # several times what a machine waits for a root
    terms = [file.name for file in (run.run / "supervision").glob("root-*.json")]
    assert terms == ["root-000001.json"]
