"""Figures of a run for Prometheus: what they are called, and an endpoint that serves them.

The endpoint is a thread that answers one question at a time. It never slows or ends what it tells of.
"""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from socketserver import TCPServer
from typing import Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from zili.errors import ConfigError

PORT = 9464
LOOPBACK = "127.0.0.1"
_PATIENCE = 2.0
"""Seconds that a client may take for its next word, and an end for the answer at hand."""
_LOOK = 0.2


class Metric(NamedTuple):
    """What is served under a name."""

    kind: str
    """`gauge` or `counter`."""
    what: str


def _gauge(what: str) -> Metric:
    return Metric("gauge", what)


def _counter(what: str) -> Metric:
    return Metric("counter", what)


METRICS = {
    # Of the run; all have the label `run`. One endpoint of a run has them.
    "zili_step": _gauge("Optimizer steps done."),
    "zili_planned_steps": _gauge("Steps after which the run is done."),
    "zili_loss": _gauge("Training loss of the last recorded step, nats a token; of preferences, a pair."),
    "zili_eval_loss": _gauge("Loss on held-out text at the last evaluation."),
    "zili_eval_bits_per_byte": _gauge("Bits per byte of held-out text at the last evaluation."),
    "zili_grad_norm": _gauge("Norm of the gradient before clipping."),
    "zili_lr": _gauge("Learning rate."),
    "zili_tokens_total": _counter("Tokens consumed since the run began; falls where it goes back to a checkpoint."),
    "zili_tokens_per_second": _gauge("Tokens a second in the last recorded step."),
    "zili_mfu": _gauge("Model FLOP/s over the matmul peak measured at start."),
    "zili_step_seconds": _gauge("Seconds of the last recorded step, its wait for data included."),
    "zili_data_seconds": _gauge("Seconds of the last recorded step that were spent waiting for data."),
    "zili_memory_peak_bytes": _gauge("Most that the first process has had of its device's memory."),
    "zili_data_position_samples": _gauge("Samples read of the data: the one count that says where the run is in it."),
    "zili_last_step_timestamp_seconds": _gauge("When the last step was recorded, seconds since 1970."),
    "zili_checkpoint_step": _gauge("Step of the newest checkpoint."),
    "zili_checkpoint_age_seconds": _gauge("Seconds since the newest checkpoint was whole."),
    "zili_checkpoint_save_seconds": _gauge("Seconds that the newest checkpoint took, mostly beside training."),
    "zili_goodput_ratio": _gauge("Share of the time under supervision in steps that were kept."),
    "zili_phase_seconds": _gauge("Seconds of the run by phase; all phases together are its time."),
    "zili_lives": _gauge("Lives of the run: times that all processes began."),
    "zili_restarts_total": _counter("Lives that ended by a failure."),
    "zili_machines": _gauge("Machines of the newest life."),
    "zili_machine_left_out": _gauge("1 for each machine that is not used any more, by `node`."),
    # Of a process: also `rank`, and under zili launch `node` and `chip`.
    "zili_process_step": _gauge("Steps of the run that the process knows to be done."),
    "zili_process_step_seconds": _gauge("Seconds of a step, the mean of about the last half minute."),
    "zili_process_phase_seconds_total": _counter("Seconds of the process by phase, since its life began."),
    "zili_process_in_phase": _gauge("1 for the phase that the process is in."),
    "zili_process_quiet_seconds": _gauge("Seconds since the process last got further."),
    "zili_straggler": _gauge("1 for each process that the run found slower than the others, by `rank` and `phase`."),
    # Of a machine under zili launch: also `node` and `chip`.
    "zili_node_processes": _gauge("Processes of the run that are alive on the machine."),
    "zili_node_working": _gauge("Whether the machine is one of the newest life: 1, else 0."),
}
"""Everything that is served. docs/operations.md, deploy/ and their tests go by it."""

_OF_RECORD = {
    **{"step": "zili_step", "loss": "zili_loss", "gradient_norm": "zili_grad_norm", "learning_rate": "zili_lr"},
    **{"tokens": "zili_tokens_total", "tokens_per_second": "zili_tokens_per_second", "matmul_share": "zili_mfu"},
    **{"step_seconds": "zili_step_seconds", "data_seconds": "zili_data_seconds"},
    **{"memory_bytes": "zili_memory_peak_bytes", "time": "zili_last_step_timestamp_seconds"},
}
_OF_EVALUATION = {"loss": "zili_eval_loss", "bits_per_byte": "zili_eval_bits_per_byte"}


class ServedFigure(NamedTuple):
    """A value under one of the names of `METRICS`."""

    name: str
    value: float
    labels: Mapping[str, str]


Figures = Callable[[], Iterable[ServedFigure]]


def of_record(record: Mapping[str, Any], **labels: str) -> Iterator[ServedFigure]:
    """Of a step as it was recorded, `time` included."""
    return _named(_OF_RECORD, record, labels)


def of_evaluation(values: Mapping[str, Any], **labels: str) -> Iterator[ServedFigure]:
    """Of an evaluation as it was recorded."""
    return _named(_OF_EVALUATION, values, labels)


def _named(names: Mapping[str, str], values: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[ServedFigure]:
    for key, name in names.items():
        if isinstance(values.get(key), int | float):
            yield ServedFigure(name, float(values[key]), labels)


def of_process(
    phase: str, step: int | None, quiet: float, seconds: Mapping[str, float], step_seconds: float | None, **labels: str
) -> Iterator[ServedFigure]:
    """Of what a process's crumbs say."""
    yield ServedFigure("zili_process_step", step or 0, labels)
    yield ServedFigure("zili_process_quiet_seconds", quiet, labels)
    yield ServedFigure("zili_process_in_phase", 1, {**labels, "phase": phase})
    if step_seconds is not None:
        yield ServedFigure("zili_process_step_seconds", step_seconds, labels)
    yield from (
        ServedFigure("zili_process_phase_seconds_total", size, {**labels, "phase": name})
        for name, size in seconds.items()
        if size
    )


class Stragglers:
    """The processes that the run has found slow, by what it has said of them. Another thread may ask for them."""

    def __init__(self) -> None:
        self.found: Mapping[tuple[int, str], Mapping[str, Any]] = {}
        """By process and phase; replaced and never changed."""

    def hear(self, said: Mapping[str, Any]) -> None:
        """An event `straggler` of the run; what is none is left out."""
        rank, phase = said.get("process"), said.get("phase")
        if isinstance(rank, int) and isinstance(phase, str):
            others = {key: one for key, one in self.found.items() if key != (rank, phase)}
            self.found = others if said.get("over") else {**others, (rank, phase): said}

    def figures(self, **labels: str) -> Iterator[ServedFigure]:
        for rank, phase in self.found:
            yield ServedFigure("zili_straggler", 1, {**labels, "rank": str(rank), "phase": phase})


class Endpoint:
    """Serves figures over HTTP until it is closed."""

    def __init__(self, figures: Figures, host: str = LOOPBACK, port: int = PORT) -> None:
        """`figures` is called for each question, by the endpoint's thread. `port` 0: any that is free.

        Raises:
            ConfigError: prometheus-client is not installed.
            OSError, UnicodeError: nothing can listen there.
            RuntimeError: there are no more threads.
        """
        refuse_missing_client()
        from prometheus_client import CollectorRegistry, make_wsgi_app

        registry = CollectorRegistry()
        registry.register(_Collector(figures))
        self._server = _Server(host, port)
        self._server.set_app(make_wsgi_app(registry))
        named = f"[{host}]" if ":" in host else host
        self.url = f"http://{named}:{self._server.server_address[1]}/metrics"
        thread = threading.Thread(target=self._server.serve_forever, args=(_LOOK,), name="zili-metrics", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._server.server_close()
            raise

    def close(self) -> None:
        """End it. An answer that a client does not take holds up nothing."""
        end = threading.Thread(target=self._end, name="zili-metrics-end", daemon=True)
        end.start()
        end.join(_PATIENCE)

    def _end(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def refuse_missing_client() -> None:
    """Raise ConfigError if prometheus-client is not installed."""
    if find_spec("prometheus_client") is None:
        raise ConfigError("figures for Prometheus need prometheus-client: pip install 'zili[metrics]'")


@contextmanager
def serving(figures: Figures, place: tuple[str, int] | None, say: Callable[[str], None]) -> Iterator[None]:
    """Serve `figures` at a host and a port, None: nowhere. `say` is told where, or why that cannot be, which is no
    reason to end anything."""
    endpoint = None
    if place is not None:
        try:
            endpoint = Endpoint(figures, *place)
            say(f"figures for Prometheus at {endpoint.url}")
        except (OSError, UnicodeError, RuntimeError) as error:  # no such host, no more threads
            why = getattr(error, "strerror", None) or error
            say(f"no figures for Prometheus at {place[0]}:{place[1]}: {why}; the run goes on without")
    try:
        yield
    finally:
        if endpoint is not None:
            endpoint.close()


def place_of_endpoint(text: str) -> tuple[str, int]:
    """`9464` or `0.0.0.0:9464` as host and port; loopback unless it is told otherwise.

    Raises:
        ConfigError: it is neither.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ConfigError(f"{text!r} is no place for figures: give PORT or HOST:PORT, such as {PORT} or 0.0.0.0:{PORT}")
    return host.strip("[]") or LOOPBACK, int(port)


class _Collector:
    """Figures as prometheus-client takes them."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        kinds = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
        found: dict[str, list[ServedFigure]] = {}
        for sample in self._figures():
            found.setdefault(sample.name, []).append(sample)
        for name, samples in found.items():
            family = kinds[METRICS[name].kind](name, METRICS[name].what)
            for sample in samples:
                family.add_sample(name, dict(sample.labels), sample.value)
            yield family


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is the run's."""

    def get_stderr(self) -> Any:
        return io.StringIO()


class _Server(WSGIServer):
    """One thread; what a client does wrong is its own affair."""

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks a name server who this is.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""
