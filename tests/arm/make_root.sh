#!/bin/sh
# Makes a folder that holds an arm64 Debian with Python, as far as one is needed to run programs in it: make_root.sh ROOT
# Needs root, debootstrap and Debian's archive. Packages are unpacked and not configured; nothing of them runs here.
set -eu
root=$1 partial=$1.partial
rm -rf -- "$partial"
mkdir -p -- "$partial"
debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,ca-certificates \
    bookworm "$partial" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
for package in "$partial"/var/cache/apt/archives/*.deb; do dpkg -x "$package" "$partial"; done
rm -rf -- "$partial"/var/cache/apt/archives "$partial"/debootstrap
mkdir -p -- "$partial/sys/devices/system/cpu" "$partial/proc" "$partial/host"
# onnxruntime asks these which kernels the processor can run, and ends where the answer is about another kind: this is
# the Cortex-A76 of a Raspberry Pi 5.
for file in possible present; do echo 0-1 > "$partial/sys/devices/system/cpu/$file"; done
for processor in 0 1; do
    printf 'processor\t: %s\nBogoMIPS\t: 108.00\n' "$processor"
    printf 'Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n'
    printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n'
done > "$partial/etc/cpuinfo"
rm -rf -- "$root"
mv -- "$partial" "$root"
