# Installing foldd on a Debian box with systemd; included by the Makefile, and works alone: make -f systemd/install.mk
#
#   make install            the daemon and the runtime          (as root)
#   make install-runtime    the runtime alone, without torch    (as root, on a device)
#   make uninstall          everything but state, configuration and users
#   make boot-test          both on a real systemd in a container (as root)
#
# PREFIX   where the programs go; the units follow it
# DESTDIR  a staging folder, for packages: nothing outside it is touched then
# WHEELS   on a box without a network: the wheel files, foldd's own among them, to install instead of this source;
#          absolute paths, or a pattern of them

PREFIX ?= /opt/foldd
DESTDIR ?=
WHEELS ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3)

SOURCE := $(abspath $(dir $(lastword $(MAKEFILE_LIST)))/..)
UNITS := $(DESTDIR)/etc/systemd/system
SYSUSERS := $(DESTDIR)/usr/lib/sysusers.d
TMPFILES := $(DESTDIR)/usr/lib/tmpfiles.d
LINKS := $(DESTDIR)/usr/local/bin
ETC := $(DESTDIR)/etc/foldd
DOC := $(DESTDIR)$(PREFIX)/share/doc/foldd
MANUAL := $(patsubst %,'%',$(wildcard $(SOURCE)/docs/*.md))
CONSTRAINTS := $(wildcard $(SOURCE)/constraints.txt)
# Only for a running system that is this one: not in a staging folder, a container build or a chroot.
LIVE = [ -z '$(DESTDIR)' ] && [ -d /run/systemd/system ]

.PHONY: install install-runtime uninstall boot-test install-daemon-files install-runtime-files

install:
	@$(MAKE) --no-print-directory -f '$(SOURCE)/systemd/install.mk' .install-python WHAT='.[daemon]'
	@$(MAKE) --no-print-directory -f '$(SOURCE)/systemd/install.mk' install-daemon-files install-runtime-files
	@if $(LIVE); then systemctl daemon-reload && systemctl try-restart foldd.service foldd-runtime.service; fi
	@echo 'foldd is installed in $(PREFIX). Next:'
	@echo '  1. look through /etc/foldd/config.toml'
	@echo '  2. runuser -u foldd -- foldd init --base /path/to/model.pt2'
	@echo '  3. systemctl enable --now foldd'
	@echo '  4. usermod -aG foldd-drop NAME, for everyone who may drop checkpoints into /var/lib/foldd/inbox'
	@echo 'To serve the model on this box too: /etc/foldd/runtime.env, then systemctl enable --now foldd-runtime.'
	@echo 'All of it: $(PREFIX)/share/doc/foldd/operations.md'

install-runtime:
	@$(MAKE) --no-print-directory -f '$(SOURCE)/systemd/install.mk' .install-python WHAT='.'
	@$(MAKE) --no-print-directory -f '$(SOURCE)/systemd/install.mk' install-runtime-files
	@if $(LIVE); then systemctl daemon-reload && systemctl try-restart foldd-runtime.service; fi
	@echo 'foldd-runtime is installed in $(PREFIX). Next:'
	@echo '  1. foldd keygen $$(hostname) --directory /etc/foldd/keys; chown foldd-runtime: /etc/foldd/keys/*.key'
	@echo '     the .pub file goes into the daemon'"'"'s `devices` folder, the daemon'"'"'s .pub into /etc/foldd/keys'
	@echo '  2. name the daemon in /etc/foldd/runtime.env'
	@echo '  3. systemctl enable --now foldd-runtime'

# Built from a copy, so that nothing of root's is left in the source tree, and nothing of an older build gets in. A
# virtual environment cannot be moved: the one that is staged under DESTDIR has its paths put right.
.PHONY: .install-python
.install-python:
	$(PYTHON) -m venv '$(DESTDIR)$(PREFIX)'
	@set -e; copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	tar -C '$(SOURCE)' --exclude='./.?*' --exclude=./build --exclude=./dist --exclude=./demo-state --exclude=./out \
	  --exclude='*.egg-info' --exclude=__pycache__ -cf - . | tar -C "$$copy" -xf -; \
	cd "$$copy"; set -x; '$(DESTDIR)$(PREFIX)/bin/python' -m pip install --quiet --disable-pip-version-check \
	  --no-warn-script-location $(if $(CONSTRAINTS),--constraint '$(CONSTRAINTS)') \
	  $(if $(WHEELS),--no-deps --force-reinstall $(WHEELS),'$(WHAT)')
	@if [ -n '$(DESTDIR)' ]; then \
	  grep -rlI '$(DESTDIR)$(PREFIX)' '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(PREFIX)/pyvenv.cfg' | \
	    xargs -r sed -i 's|$(DESTDIR)$(PREFIX)|$(PREFIX)|g'; fi

install-daemon-files:
	install -d -m 755 '$(UNITS)' '$(SYSUSERS)' '$(TMPFILES)' '$(LINKS)' '$(ETC)' '$(ETC)/submitters' '$(ETC)/devices'
	install -D -m 644 -t '$(DOC)' '$(SOURCE)/config.toml' $(MANUAL)
	sed 's|/opt/foldd|$(PREFIX)|g' '$(SOURCE)/systemd/foldd.service' > '$(UNITS)/foldd.service'
	install -m 644 '$(SOURCE)/systemd/foldd.sysusers' '$(SYSUSERS)/foldd.conf'
	install -m 644 '$(SOURCE)/systemd/foldd.tmpfiles' '$(TMPFILES)/foldd.conf'
	@[ -e '$(ETC)/config.toml' ] || (set -x; install -m 644 '$(SOURCE)/systemd/config.toml' '$(ETC)/config.toml')
	ln -sfn '$(PREFIX)/bin/foldd' '$(LINKS)/foldd'
	@if [ -z '$(DESTDIR)' ]; then set -x; systemd-sysusers foldd.conf && systemd-tmpfiles --create foldd.conf; fi

install-runtime-files:
	install -d -m 755 '$(UNITS)' '$(SYSUSERS)' '$(LINKS)' '$(ETC)' '$(ETC)/keys'
	install -D -m 644 -t '$(DOC)' $(MANUAL)
	sed 's|/opt/foldd|$(PREFIX)|g' '$(SOURCE)/systemd/foldd-runtime.service' > '$(UNITS)/foldd-runtime.service'
	install -m 644 '$(SOURCE)/systemd/foldd-runtime.sysusers' '$(SYSUSERS)/foldd-runtime.conf'
	@[ -e '$(ETC)/runtime.env' ] || (set -x; install -m 644 '$(SOURCE)/systemd/runtime.env' '$(ETC)/runtime.env')
	ln -sfn '$(PREFIX)/bin/foldd' '$(LINKS)/foldd'
	ln -sfn '$(PREFIX)/bin/foldd-runtime' '$(LINKS)/foldd-runtime'
	@if [ -z '$(DESTDIR)' ]; then set -x; systemd-sysusers foldd-runtime.conf; fi

uninstall:
	@if $(LIVE); then systemctl disable --now foldd.service foldd-runtime.service 2>/dev/null || true; fi
	rm -f '$(UNITS)/foldd.service' '$(UNITS)/foldd-runtime.service'
	rm -f '$(SYSUSERS)/foldd.conf' '$(SYSUSERS)/foldd-runtime.conf' '$(TMPFILES)/foldd.conf'
	rm -f '$(LINKS)/foldd' '$(LINKS)/foldd-runtime'
	@# Only what looks like our virtual environment is removed with all that is in it.
	@if [ -e '$(DESTDIR)$(PREFIX)/bin/foldd' ] && [ -e '$(DESTDIR)$(PREFIX)/pyvenv.cfg' ]; then \
	  (set -x; rm -rf '$(DESTDIR)$(PREFIX)'); fi
	@if $(LIVE); then systemctl daemon-reload; fi
	@echo 'Left in place: /var/lib/foldd, /var/lib/foldd-runtime, /etc/foldd, the users foldd and foldd-runtime.'

boot-test:
	'$(SOURCE)/systemd/boot-test.sh'
