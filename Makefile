# `make` targets work in a virtual environment of their own, made on first use.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV ?= .venv
EXTRAS ?= test
RUN := $(VENV)/bin/python
EXAMPLE := fantasy_jax/assets/example
# Another choice of extras is another stamp, so that it is installed on top.
comma := ,
space := $(subst ,, )
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

help:
	@echo "make install    a virtual environment in $(VENV) with everything that is needed"
	@echo "make demo       a talking and two acting videos from what comes with the project, in $(DEMO)"
	@echo "make test       all tests that are quick"
	@echo "make test-all   all tests, slow ones too"
	@echo "make lint       style, format and layers of imports"
	@echo "make clean      remove what these targets made"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "fantasy_jax needs Python 3.11 or newer, and none was found." \
		"Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

DEMO := out/demo
TALK := sample.py --config=configs/tiny.py
ACT := sample.py --config=configs/tiny_portrait.py
DRIVERS := $(EXAMPLE)/driver_1.mp4 $(EXAMPLE)/driver_2.mp4

# With whatever extras are installed; the tests need those of `test`.
demo: $(or $(wildcard $(VENV)/.installed-*),$(INSTALLED))
	$(RUN) $(TALK) --image=$(EXAMPLE)/portrait.png --audio=$(EXAMPLE)/speech.wav --output=$(DEMO)/talk.mp4
	$(RUN) -m fantasy_jax.evaluation.video $(DEMO)/talk.mp4 --image=$(EXAMPLE)/portrait.png --face=0.19,0.05,0.76,0.80
	$(RUN) $(ACT) --image=$(EXAMPLE)/portrait.png --driver=$(firstword $(DRIVERS)) --output=$(DEMO)/act.mp4
	$(RUN) $(ACT) --image=$(EXAMPLE)/pair.png --size=64x128 $(DRIVERS:%=--driver=%) --output=$(DEMO)/two.mp4
	$(RUN) -m fantasy_jax.evaluation.panels $(DEMO)/demo.png --row=$(DEMO)/talk.mp4 --row=$(DEMO)/act.mp4,$(firstword $(DRIVERS)) \
		--row=$(DEMO)/two.mp4,$(subst $(space),$(comma),$(DRIVERS))

test: install
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow"

test-all: install
	$(RUN) -m pytest -n 2 --dist worksteal --durations=15

test-networks: install
	$(RUN) -m pytest -n 2 --dist worksteal -m "networks and not slow"

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache --no-logo

clean:
	rm -rf $(VENV) build $(DEMO) *.egg-info .pytest_cache .ruff_cache
