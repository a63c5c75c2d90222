# make drive: watch it drive.  make test: the whole test suite.  Both make their own environment first.
# make faults: inject every fault into the running graph; writes docs/reliability.json and its table.
# make fuzz: 100,000 hostile messages.  make soak: drive for an hour, start and stop 100 times, 500 lifecycle cycles; what grows, what is left.
VENV ?= .venv
export VENV PYTHON
PY = $(VENV)/bin/python

.PHONY: help drive test check format faults fuzz soak
help:
	@sed -n 's/^# //p' Makefile

drive:
	@scripts/environment.sh drive
	@exec $(PY) -m mose_ros.nodes.drive $(DRIVE_ARGS)

test:
	@scripts/environment.sh test
ifdef TEST_ARGS
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(TEST_ARGS)
else  # the training's tests only compute: on a second core, and only where the graph of nodes leaves it
	@export OMP_NUM_THREADS=1; said=$$(mktemp); \
	nice -n 19 $(PY) -m pytest -p no:cacheprovider test/training >$$said 2>&1 & training=$$!; \
	$(PY) -m pytest --ignore=test/training; others=$$?; \
	wait $$training; training=$$?; cat $$said; rm -f $$said; \
	exit $$((others | training))
endif

check:
	@scripts/environment.sh test
	@$(PY) -m ruff format --check . && $(PY) -m ruff check .

format:
	@scripts/environment.sh test
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .

faults:
	@scripts/environment.sh test
	@PYTHONPATH=.:test OMP_NUM_THREADS=1 $(PY) -m nodes.measure_faults $(FAULTS_ARGS)

fuzz:
	@scripts/environment.sh test
	@OMP_NUM_THREADS=1 $(PY) -m pytest test/test_fuzz.py -s --messages 100000 $(FUZZ_ARGS)

soak:
	@scripts/environment.sh drive
	@$(PY) -m mose_ros.nodes.soak $(SOAK_ARGS)
	@$(PY) -m mose_ros.nodes.cycles $(CYCLES_ARGS)
