/* SPDX-License-Identifier: MIT */
/*
 * CRC-32C (Castagnoli): reflected, polynomial 0x82f63b78, begun and ended with all ones inverted.
 *
 * Goes on from piece to piece: crc32c(crc32c(0, a), b) is that of a and b together.  Any thread.
 */
#ifndef STRATA_BASE_CRC32C_H
#define STRATA_BASE_CRC32C_H

#include <stddef.h>
#include <stdint.h>

uint32_t crc32c(uint32_t crc, const void *data, size_t length);

#endif
