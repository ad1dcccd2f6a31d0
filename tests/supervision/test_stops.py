"""What stops a run at once, and what never does: a wrong restart costs seconds, a wrong stop a night."""

from __future__ import annotations

from dataclasses import replace

import pytest
from failing import PHASES, SETS, corpus, fail, given

from zili.supervision.rules import rule_for
from zili.supervision.verdicts import Ending, failure_of, judge

MAY_PASS = (
    "ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded with url: /x",
    "requests.exceptions.ReadTimeout: HTTPSConnectionPool(host='a', port=443): Read timed out. (read timeout=10)",
    "ValueError: Connection error, and we cannot find the requested files in the cached path.",
    "LocalEntryNotFoundError: An error happened while trying to locate the file, and we cannot find the requested "
    "files in the local cache. Please check your connection and try again",
    "TimeoutError: The client socket has timed out after 60s while trying to connect to (a, 29500).",
    "RuntimeError: [1] is setting up the communicator and retreiving the unique id: Socket Timeout",
    "RuntimeError: store->get('0') got error: Connection reset by peer",
    "ConnectionRefusedError: [Errno 111] Connection refused",
    "EOFError: rank 3: the peer closed the socket",
    "RuntimeError: Rank 0 successfully reached monitoredBarrier, but received errors while waiting for send/recv",
    "torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError: no rank came",
    "BlockingIOError: [Errno 11] Resource temporarily unavailable",
    "OSError: [Errno 121] Remote I/O error: '/data/shard-3'",
    "OSError: [Errno 116] Stale file handle",
    "RuntimeError: NCCL error in: ProcessGroupNCCL.cpp:1, unhandled system error, NCCL version 2.18. ncclSystemError: "
    "System call (e.g. socket, malloc) or external library call failed or device error.",
    "RuntimeError: CUDA error: unspecified launch failure. Compile with `TORCH_USE_CUDA_DSA`",
    "RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "torch.AcceleratorError: the accelerator does not answer",
    "RuntimeError: the device gave a wrong result",
    "RuntimeError: NPU error, error code is 507015",
    "RuntimeError: HCCL error: EI0006: Getting socket times out.",
    "RuntimeError: CNCL error: CNCL_RET_ERR_SYS_SOCKET",
    "OSError: could not read 4096 bytes: the file system was busy",
    "RuntimeError: lost contact with the coordinator, retry later",
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: train.py FAILED",
    "subprocess.CalledProcessError: Command '['python', 'train.py']' returned non-zero exit status 1.",
    "INFO going on. Exception ignored in: <function Pool.__del__> AttributeError: 'NoneType' has no 'x'",
    "FileNotFoundError: [Errno 2] No such file or directory: '/tmp/pymp-x1'",
    "apex: ImportError: no apex, going on; RuntimeError: Connection closed by peer [10.0.0.1]:1",
    "wandb: Network error (JSONDecodeError), entering retry loop. UsageError: Error communicating with wandb process",
    "Installed CUDA version 11.5 does not match the version torch was compiled with 11.8, accepting this combination. "
    "RuntimeError: Connection closed by peer [10.0.0.1]:1",
    'Failed to pull image "a/b:1": Get "https://a/v2/": dial tcp: lookup a: no such host',
    "Back-off pulling image a/b:1: ImagePullBackOff",
    "requests.exceptions.HTTPError: 429 Client Error: Too Many Requests for url: https://a/b",
    "botocore.exceptions.ClientError: An error occurred (409) when calling the PutObject operation: OperationAborted",
    "botocore.exceptions.ClientError: An error occurred (503) when calling the PutObject operation: SlowDown",
    "Loaded state dict from epoch 3. RuntimeError: Connection reset by peer",
    "slurmstepd: error: something",
    "[ERROR] something",
    "Traceback (most recent call last):",
    "no word of a cause",
)


@pytest.mark.parametrize("step", (None, 7))
@pytest.mark.parametrize("phase", (None, *PHASES))
def test_what_may_pass_never_stops_a_run(phase: str | None, step: int | None) -> None:
    """Also before the first step, and wherever it stands: a wrong restart costs seconds, a wrong stop a night."""
    for text in MAY_PASS:
        for told in ({"error": text}, {"log": text}):
            failure = failure_of(Ending(0, "a", code=1, phase=phase, step=step, **told))
            assert judge(failure, [], may_skip_data=True).action != "stop", (failure.rule, text)


@pytest.mark.parametrize("phase", ("load", "save", "evaluate"))
def test_real_endings_that_may_pass_stop_no_run_that_trained(phase: str) -> None:
    """Where a program's own exceptions stop a run also after a step."""
    # The fourth set stays blind. One of it would stop a launch that loads: an object store's 403 that passes.
    for name, case in ((name, case) for endings in SETS[:3] for name, case in corpus(endings).items()):
        if case["action"] in ("restart", "replace") and case.get("also") != "stop":
            failure = failure_of(replace(given(case), phase=phase, step=7))
            assert judge(failure, [], may_skip_data=True).action != "stop", (name, failure.rule)


@pytest.mark.parametrize("step", (None, 7))
def test_a_server_that_refuses_stops_a_run_at_any_step(step: int | None) -> None:
    for text in (
        "wandb.errors.CommError: returned error 403",
        "requests.HTTPError: 451 Client Error: for url: https://a",
    ):
        assert judge(failure_of(Ending(0, "a", code=1, error=text, step=step)), []).action == "stop", text


OF_THE_PROGRAM = (
    "RuntimeError: Tensors of type TensorImpl do not have numel",
    "RuntimeError: Expected hidden size (2, 8, 16), got [2, 4, 16]",
    "NotImplementedError: Could not run 'aten::foo' with arguments from the 'X' backend.",
    "RuntimeError: Distributed package doesn't have MPI built in",
    "OSError: Can't load tokenizer for 'gpt9'.",
    "omegaconf.errors.ConfigAttributeError: Key 'steps' is not in struct",
    "deepspeed.runtime.config.DeepSpeedConfigError: train_batch_size is not equal to micro_batch times world",
    "AssertionError: heads are not divisible by tensor parallel size",
    "AssertionError",
    "KeyError: 'input_ids'",
    "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
)


@pytest.mark.parametrize("text", OF_THE_PROGRAM)
def test_what_the_program_raised_stops_before_the_first_step_only(text: str) -> None:
    for told in ({"error": text}, {"log": f"epoch 0\nTraceback (most recent call last):\n  File\n{text}\n"}):
        assert judge(failure_of(Ending(0, "a", code=1, **told)), []).action == "stop"
        later = failure_of(Ending(0, "a", code=1, step=7, **told))
        assert judge(later, []).action == "restart"
        assert judge(later, [later]).action == "stop", "at the same step again"


SAME_EACH_TIME = {
    "evaluate": "KeyError: 'eval_loss'",
    "save": "ValueError: a tensor of that kind is to be saved by its owner",
}


@pytest.mark.parametrize("phase", SAME_EACH_TIME)
def test_what_the_program_raises_in_each_save_stops_at_once(phase: str) -> None:
    failure = failure_of(Ending(0, "a", code=1, error=SAME_EACH_TIME[phase], phase=phase, step=7))
    assert judge(failure, []).action == "stop"
    assert judge(replace(failure, phase="step"), []).action == "restart"


def test_a_file_that_vanished_in_a_save_may_come_of_a_race() -> None:
    error = "FileNotFoundError: [Errno 2] No such file or directory: 'tmp-checkpoint-7'"
    assert judge(failure_of(Ending(0, "a", code=1, error=error, phase="save", step=7)), []).action == "restart"
    ours = "zili: the checkpoint of step 7 cannot be written: its folder does not exist any more"
    assert judge(failure_of(Ending(0, "a", code=5, error=ours, phase="save", step=7)), []).action == "restart"


def test_the_first_life_of_a_launch_has_proved_nothing() -> None:
    failure = failure_of(Ending(0, "a", code=1, error="AssertionError: no iterations left", phase="load", step=7))
    assert judge(failure, []).action == "stop", "the run had trained, but by another command"
    assert judge(failure, [fail("peer-lost", 7)]).action == "restart", "an earlier life of this one got further"
    assert judge(fail("device-memory", 7), []).action == "restart"


SIGNATURE = "TypeError: sharded_state_dict() got an unexpected keyword argument 'metadata'"


def test_a_call_that_cannot_work_stops_at_any_step() -> None:
    assert judge(failure_of(Ending(0, "a", code=1, error=SIGNATURE, phase="step", step=7)), []).action == "stop"
    nothing = "AttributeError: 'NoneType' object has no attribute 'shape'"
    assert judge(failure_of(Ending(0, "a", code=1, error=nothing, phase="step", step=7)), []).action == "restart"


def test_the_barest_exception_is_one() -> None:
    log = f"epoch 0\nException: Installed version 11.0 does not match\nException ignored in: <__del__>\n{SIGNATURE}"
    assert rule_for(Ending(0, "a", code=1, log=log)).name == "program-refused"


def test_a_launchers_exception_is_not_the_programs() -> None:
    launcher = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: train.py FAILED"
    ended = Ending(0, "a", code=1, log=f"RuntimeError: running_mean should contain 3 elements not 4\n{launcher}")
    assert rule_for(ended).name == "program-refused"
