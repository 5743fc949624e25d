# The platforms whose wheels pip takes on aarch64 with glibc 2.28 or later, for its flag --platform. Sourced.
# shellcheck shell=bash disable=SC2034
readonly PLATFORMS=(manylinux_2_{17,24,26,27,28}_aarch64 manylinux2014_aarch64)
