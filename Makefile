# make            build into .venv; then run ./ttun.py
# make help       list the other targets

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEELS := $(VENV)/wheels
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml
MADE := $(VENV) build dist *.egg-info ttun/_codec*.so ttun/__pycache__ ttun/*/__pycache__ \
  .mypy_cache .ruff_cache .pytest_cache .hypothesis
C_FILES := $(filter-out %.cdef.h,$(wildcard csrc/*.[ch] ttun/lab/*.c tests/*/*.[ch]))
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# $(LISTED) NAME: the strings of that list in pyproject.toml.
LISTED := $(BIN)/python -c "import re, sys; text = open('pyproject.toml').read(); \
  print(*re.findall(r'\"(.+?)\"', re.search(rf'^{sys.argv[1]} = \[(.*?)\]', text, re.M)[1]))"
# $(call fetch,arguments of pip): run a pip command that needs network access; without it, print one line.
export PIP_RETRIES ?= 2
UNREACHED := NewConnectionError|NameResolutionError|TimeoutError|Read timed out|Max retries|onnection (broken|reset)|versions: none
fetch = $(PIP) $(1) > $(VENV)/pip.log 2>&1 || { \
  if grep -qE '$(UNREACHED)' $(VENV)/pip.log; then \
    echo 'pip cannot reach its package index: make needs network access (see $(VENV)/pip.log)'; \
  else cat $(VENV)/pip.log; fi >&2; exit 1; }
FUZZERS := $(basename $(notdir $(wildcard tests/fuzz/*.c)))
FUZZ_SECONDS ?= 60
SECONDS ?= 120
SEED ?= 1
EACH ?= 15
JOBS ?= 12
WORKERS ?= 2
WIRE ?= x1
PYTHON_FILES := ttun ttun.py setup.py csrc tests packaging

# Installation paths; DESTDIR is prepended to all of them, for packages.
PREFIX ?= /usr/local
DESTDIR ?=
BINDIR = $(PREFIX)/bin
LIBDIR = $(PREFIX)/lib/ttun
SHARE = $(DESTDIR)$(PREFIX)/share
SYSTEMD = $(DESTDIR)$(PREFIX)/lib/systemd/system
SYSUSERS = $(DESTDIR)$(PREFIX)/lib/sysusers.d
# fish from a distribution does not search /usr/local.
FISH = $(if $(filter /usr/local,$(PREFIX)),$(DESTDIR)/etc/fish/completions,$(SHARE)/fish/vendor_completions.d)
FILL_IN = sed -e 's|@BINDIR@|$(BINDIR)|' -e 's|@LIBDIR@|$(LIBDIR)|' \
  -e "s|@PYTHON@|$$($(BIN)/python -c 'import sys; print(sys._base_executable)')|"

.PHONY: all demo test asan ubsan tsan fuzz faults mutants soak dist check-dist wheels check-wheels \
  check-services pictures install install-files uninstall lint format help clean

# As root in a user's tree, as under sudo: give the files that were made to that user, except the root
# file systems of check-wheels and check-services, whose files have other owners.
ifeq ($(shell id -u)-$(shell find . -maxdepth 0 ! -user 0)$(GIVEN_BACK),0-.)
.NOTPARALLEL:
.PHONY: $(MAKECMDGOALS)
$(or $(MAKECMDGOALS),all):
	@PYTHONDONTWRITEBYTECODE=1 $(MAKE) --no-print-directory GIVEN_BACK=1 $@; code=$$?; \
	find $(MADE) -path 'build/check-[ws]*' -prune -o -user 0 \
	  -exec chown -h $$(stat -c %u:%g .) {} + 2> /dev/null; exit $$code
else

all: $(VENV)/.built
	@echo 'built; now: sudo ./ttun.py server'

help:
	@echo 'make         build into .venv; then: sudo ./ttun.py server'
	@echo 'make demo    run both ends on this machine: pings, a transfer, a table'
	@echo 'make test    run all tests; without root, in a user namespace'
	@echo 'make asan    run them with AddressSanitizer in the codec; also: ubsan, tsan'
	@echo 'make fuzz    FUZZ_SECONDS=60: run each fuzzer; needs clang and its runtime'
	@echo 'make faults  SECONDS=120 SEED=1 WIRE=x1: faults injected into a tunnel under traffic; as root'
	@echo 'make mutants SEED=1 EACH=15 WORKERS=2: mutation testing; as root'
	@echo 'make soak    SECONDS=1200 SEED=1: random connections through Tox, checked for leaks; as root'
	@echo 'make install PREFIX=/usr/local DESTDIR=: program, man page, completions, systemd units'
	@echo 'make uninstall PREFIX=/usr/local DESTDIR=: remove them'
	@echo 'make dist    build the sdist, and a wheel from it, into dist/'
	@echo 'make check-dist: install that wheel in a clean environment, run the unit tests of the sdist'
	@echo 'make wheels  build wheels and their dependencies for six platforms, into dist/'
	@echo 'make check-wheels: install and run them under glibc and musl, ARM emulated; as root'
	@echo 'make check-services: test the systemd units under a real systemd, in namespaces; as root'
	@echo 'make pictures: record the terminal sessions of the README; as root'
	@echo 'make lint    ruff, mypy --strict, import-linter, clang-format, gcc and clang with -Werror'
	@echo 'make format  format the sources'
	@echo 'make clean   remove everything that was built'

demo: $(VENV)/.built
	./ttun.py demo

# Run JOBS tests at once, as most of them wait; then those that measure, alone. TESTS: pytest arguments.
test: $(VENV)/.built $(VENV)/.tools-test
ifdef TESTS
	$(BIN)/python -m pytest $(TESTS)
else
	@code=0; set -x; $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not alone' || code=1; \
	$(BIN)/python -m pytest -m alone || code=1; exit $$code
endif

asan ubsan tsan: $(VENV)/.built $(VENV)/.tools-test
	$(BIN)/python tests/sanitize.py $@ $(TESTS)

# A fuzzer leaves what it finds in build/fuzz; move it to tests/fuzz/seeds/ once the bug is fixed.
build/fuzz/%: tests/fuzz/%.c tests/fuzz/fuzz.h $(wildcard csrc/*.[ch])
	@mkdir -p build/fuzz
	clang -std=c11 -g -O1 -Wall -Wextra -Werror -fno-omit-frame-pointer -Icsrc \
	  -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  $< $(wildcard csrc/*.c) -pthread -ldl -o $@

fuzz: $(VENV)/.built $(VENV)/.tools-test $(FUZZERS:%=build/fuzz/%)
	@for fuzzer in $(FUZZERS); do \
	  mkdir -p build/fuzz/corpus/$$fuzzer; \
	  build/fuzz/$$fuzzer -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -print_final_stats=1 \
	    -artifact_prefix=build/fuzz/$$fuzzer- build/fuzz/corpus/$$fuzzer \
	    tests/fuzz/seeds/$$fuzzer > build/fuzz/$$fuzzer.log 2>&1 || \
	    { tail -n 50 build/fuzz/$$fuzzer.log; exit 1; }; \
	  echo "$$fuzzer: $$(grep -o '[0-9]*$$' build/fuzz/$$fuzzer.log | tail -n 5 | head -n 1) inputs"; \
	done
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest tests/fuzz

# The program and its dependencies go into their own directory, which no other Python reads. This needs no
# network and leaves no files of root's in this tree, so make clean needs no sudo.
# Whatever umask root has: user ttun runs what is installed.
install: $(VENV)/.built
	@umask 022 && $(MAKE) --no-print-directory install-files

install-files:
	rm -rf $(DESTDIR)$(LIBDIR) build/lib* build/bdist.*
	TTUN_WHOLE=1 $(PIP) install --no-index --find-links $(WHEELS) --no-build-isolation \
	  --target $(DESTDIR)$(LIBDIR) .
	rm -rf $(DESTDIR)$(LIBDIR)/bin build/lib* build/bdist.* build/temp.* ttun_tunnel.egg-info
	install -d $(DESTDIR)$(BINDIR) $(SYSTEMD) $(SYSUSERS) $(SHARE)/man/man1 \
	  $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(FISH)
	$(FILL_IN) packaging/launcher.in > $(DESTDIR)$(BINDIR)/ttun
	chmod 755 $(DESTDIR)$(BINDIR)/ttun
	PYTHONPATH=. $(BIN)/python packaging/manual.py man > $(SHARE)/man/man1/ttun.1
	PYTHONPATH=. $(BIN)/python packaging/manual.py bash > $(SHARE)/bash-completion/completions/ttun
	PYTHONPATH=. $(BIN)/python packaging/manual.py zsh > $(SHARE)/zsh/site-functions/_ttun
	PYTHONPATH=. $(BIN)/python packaging/manual.py fish > $(FISH)/ttun.fish
	for unit in $(notdir $(wildcard packaging/systemd/*.service)); do \
	  $(FILL_IN) packaging/systemd/$$unit > $(SYSTEMD)/$$unit || exit 1; \
	done
	install -m 644 packaging/systemd/sysusers.conf $(SYSUSERS)/ttun.conf
	@echo 'for the services, once: systemd-sysusers && systemctl daemon-reload; see docs/services.md'

uninstall:
	rm -rf $(DESTDIR)$(LIBDIR)
	rm -f $(DESTDIR)$(BINDIR)/ttun $(SYSTEMD)/ttun-server@.service \
	  $(SYSTEMD)/ttun-client@.service $(SYSTEMD)/ttun-tox@.service $(SYSUSERS)/ttun.conf \
	  $(SHARE)/man/man1/ttun.1 $(SHARE)/bash-completion/completions/ttun \
	  $(SHARE)/zsh/site-functions/_ttun $(FISH)/ttun.fish

# What goes to a package index: the sdist, and a wheel built from it alone. pip's isolated builds find
# the requirements of pyproject.toml among the wheels, so this needs no network.
dist: $(VENV)/.built $(VENV)/.tools-dist
	rm -rf dist/ttun_tunnel-*.tar.gz dist/ttun_tunnel-*-linux_*.whl build/lib* build/bdist.*
	@PIP_NO_INDEX=1 PIP_FIND_LINKS=$(abspath $(WHEELS)) $(BIN)/python -m build \
	  > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	$(BIN)/python -m twine check --strict dist/ttun_tunnel-*

check-dist: dist $(VENV)/.tools-test
	packaging/check_dist.sh

# PLATFORMS: a subset of those in packaging/wheels.py (default: all).
wheels: $(VENV)/.tools-wheels
	nice $(BIN)/python packaging/wheels.py $(PLATFORMS)

check-wheels: $(VENV)/.tools-wheels
	nice $(BIN)/python packaging/check_wheels.py

check-services: $(VENV)/.built
	packaging/check_services.sh

pictures: $(VENV)/.built
	PYTHONPATH=.:tests/helpers $(BIN)/python -B docs/pictures.py

faults: $(VENV)/.built
	PYTHONPATH=.:tests/helpers $(BIN)/python -B tests/soak/faults.py $(SECONDS) $(SEED) $(WIRE)

mutants: $(VENV)/.built $(VENV)/.tools-test
	PYTHONPATH=.:tests/helpers $(BIN)/python -B tests/mutants.py $(SEED) $(EACH) $(WORKERS) $(MODULES)

soak: $(VENV)/.built
	PYTHONPATH=.:tests/helpers $(BIN)/python -B tests/soak/toxsoak.py $(SECONDS) $(SEED)

lint: $(VENV)/.built $(VENV)/.tools-test $(VENV)/.tools-lint
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy
	$(BIN)/mypy --strict ttun.py
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	@for compiler in gcc clang musl-gcc; do \
	  command -v $$compiler > /dev/null || { echo "$$compiler: not found, skipped"; continue; }; \
	  echo "$$compiler -Wall -Wextra -Werror"; \
	  for file in $(filter %.c,$(C_FILES)); do \
	    $$compiler -std=c11 -O2 -Wall -Wextra -Werror -Icsrc -fsyntax-only $$file || exit 1; \
	  done; \
	done

format: $(VENV)/.tools-lint
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(C_FILES)

clean:
	rm -rf $(MADE)
	find . -name __pycache__ -prune -exec rm -rf {} +

# Check for the build dependencies; name the missing ones in one apt command.
$(VENV)/.venv:
	@missing=; \
	command -v cc > /dev/null || missing="$$missing gcc libc6-dev"; \
	command -v $(PYTHON) > /dev/null || missing="$$missing python3"; \
	$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' \
	  2> /dev/null || missing="$$missing python3-dev"; \
	command -v ip > /dev/null || missing="$$missing iproute2"; \
	test -z "$$missing" || { echo "missing build dependencies (sudo apt install$$missing)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Keep the wheels that ttun and its man page need, so that neither the next build nor make install needs
# network access.
$(VENV)/.built: $(VENV)/.venv $(SOURCES) Makefile
	@needs="$$($(LISTED) requires) $$($(LISTED) dependencies) $$($(LISTED) manual)"; \
	$(PIP) wheel --no-index --find-links $(WHEELS) -w $(WHEELS) $$needs > $(VENV)/pip.log 2>&1 || \
	  { $(call fetch,wheel -w $(WHEELS) $$needs); } && \
	$(PIP) install --no-index --find-links $(WHEELS) $$needs
	@rm -rf ttun.egg-info || :  # from an earlier name: ttun doctor would take it for another project
	@$(BIN)/python setup.py -q build_ext --inplace --force --build-lib $(VENV)/codec \
	  --build-temp $(VENV)/codec > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@rm -r $(VENV)/codec
	@$(BIN)/python -m compileall -q ttun  # else sudo ./ttun.py does it, in directories owned by root
	@touch $@

$(VENV)/.tools-%: $(VENV)/.venv pyproject.toml
	@$(call fetch,install $$($(LISTED) $*))
	@touch $@
endif
