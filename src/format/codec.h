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

/*
 * Grains of streamOptimized VMDK files: a zlib stream.  `in` of decode is the grain's marker (12
 * bytes) and the stream behind it; encode makes the stream alone.  A stream that ends early leaves
 * zeros.
 */
extern const struct codec codec_vmdk;
/* The same for files without markers. */
extern const struct codec codec_vmdk_plain;

#endif
