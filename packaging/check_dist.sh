#!/bin/sh
# make check-dist: check the files that make dist made. Requires neither network nor root.
#
# 1. The sdist has the same files as git.
# 2. The wheel, installed by pip without an index into an empty virtual environment, runs
#    (tests/helpers/check_install.py), and its help() is that of the source.
# 3. In the unpacked sdist the codec is built, and the tests that need no root pass (TESTS selects).
set -eu
cd "$(dirname "$0")/.."
here=$PWD python=$PWD/.venv/bin/python work=$PWD/build/check-dist
rm -rf "$work"
mkdir -p "$work"
tar -xzf dist/ttun_tunnel-*.tar.gz -C "$work"
cd "$work"/ttun_tunnel-*
if [ -e "$here/.git" ]; then
    # In CI, root may not own the checkout.
    git -C "$here" -c safe.directory="$here" ls-files | sort > "$work/git"
    find . -type f | sed 's|^./||' | grep -vE '[.]egg-info/|^(PKG-INFO|setup.cfg)$' | sort |
        diff "$work/git" - || { echo 'git and the sdist differ (see MANIFEST.in)' >&2; exit 1; }
fi
ln -s "$here/.venv" .venv

"$python" -m venv "$work/venv"
installed=$work/venv/bin/python
"$installed" -m pip -q --disable-pip-version-check install --no-index \
    --find-links "$here/.venv/wheels" "$here"/dist/ttun_tunnel-*-linux_*.whl
(cd "$work" && "$installed" "$here/tests/helpers/check_install.py")
"$python" setup.py -q build_ext --inplace
help='import pydoc, ttun
for each in ttun.Server, ttun.Client, ttun.Status, ttun.TtunError: print(pydoc.render_doc(each))
print(ttun.__doc__)'
"$python" -c "$help" > "$work/help.source"
(cd "$work" && "$installed" -c "$help" > help.wheel)
cmp "$work/help.source" "$work/help.wheel"

# shellcheck disable=SC2086 # TESTS: words for pytest; all tests if it is empty
"$python" -m pytest -q -n 4 -m 'not hosts and not slow' ${TESTS:-}
echo 'the sdist and its wheel are complete'
