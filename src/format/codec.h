/* SPDX-License-Identifier: MIT */
/*
 * The codings of compressed clusters of qcow and qcow2, as codecs of disk/driver.h: pure functions
 * of their arguments, for any thread.
 */
#ifndef STRATA_FORMAT_CODEC_H
#define STRATA_FORMAT_CODEC_H

#include "disk/driver.h"

extern const struct codec codec_deflate; /* a raw deflate stream; qcow2 calls it "zlib" */
extern const struct codec codec_zstd;

#endif
