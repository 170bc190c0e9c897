#!/bin/bash
# SPDX-License-Identifier: MIT
#
# clang-format over every C file, with the one version whose output counts (14: Debian 12's).
# Arguments go to clang-format: --dry-run -Werror to check, -i to change.
set -euo pipefail
cd "$(dirname "$0")/.."
fmt=$(command -v clang-format-14 || true)
if [ -z "$fmt" ]; then
    echo "clang-format-14 is missing: run 'make setup' first" >&2
    exit 1
fi
{ find src tests bench include -name '*.[ch]' -print0 2>/dev/null || true; } | xargs -0 "$fmt" "$@"
