/* SPDX-License-Identifier: MIT */
/*
 * The two codings of a compressed qcow2 cluster, as codecs of disk/driver.h: pure functions of
 * their arguments, for any thread.  Which one an image uses is its header's compression type.
 */
#ifndef STRATA_FORMAT_QCOW2_CODEC_H
#define STRATA_FORMAT_QCOW2_CODEC_H

#include "disk/driver.h"

extern const struct codec qcow2_codec_deflate; /* compression type 0, "zlib" */
extern const struct codec qcow2_codec_zstd;    /* compression type 1, "zstd" */

#endif
