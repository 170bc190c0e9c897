/* SPDX-License-Identifier: MIT */
/*
 * libnbd, loaded when the first NBD disk is named: it brings a TLS and an XML library along, and
 * programs that open files should not wait for those to start.
 */
#ifndef STRATA_STORAGE_NBD_LIB_H
#define STRATA_STORAGE_NBD_LIB_H

#include <libnbd.h>

struct err;

#define NBD_LIB_FUNCTIONS(X)                                                                       \
    X(create)                                                                                      \
    X(close)                                                                                       \
    X(get_error)                                                                                   \
    X(get_errno)                                                                                   \
    X(set_opt_mode)                                                                                \
    X(set_export_name)                                                                             \
    X(set_full_info)                                                                               \
    X(set_strict_mode)                                                                             \
    X(set_handshake_flags)                                                                         \
    X(set_tls)                                                                                     \
    X(set_tls_certificates)                                                                        \
    X(set_tls_verify_peer)                                                                         \
    X(set_tls_username)                                                                            \
    X(set_tls_psk_file)                                                                            \
    X(add_meta_context)                                                                            \
    X(connect_unix)                                                                                \
    X(connect_tcp)                                                                                 \
    X(opt_list)                                                                                    \
    X(opt_info)                                                                                    \
    X(opt_abort)                                                                                   \
    X(opt_list_meta_context)                                                                       \
    X(get_size)                                                                                    \
    X(get_block_size)                                                                              \
    X(is_read_only)                                                                                \
    X(is_rotational)                                                                               \
    X(can_flush)                                                                                   \
    X(can_fua)                                                                                     \
    X(can_trim)                                                                                    \
    X(can_zero)                                                                                    \
    X(can_df)                                                                                      \
    X(can_multi_conn)                                                                              \
    X(can_cache)                                                                                   \
    X(can_fast_zero)                                                                               \
    X(can_meta_context)                                                                            \
    X(shutdown)                                                                                    \
    X(aio_is_negotiating)                                                                          \
    X(aio_is_connecting)                                                                           \
    X(aio_is_ready)                                                                                \
    X(aio_is_dead)                                                                                 \
    X(aio_is_closed)                                                                               \
    X(aio_connect)                                                                                 \
    X(aio_get_fd)                                                                                  \
    X(aio_get_direction)                                                                           \
    X(aio_notify_read)                                                                             \
    X(aio_notify_write)                                                                            \
    X(aio_pread)                                                                                   \
    X(aio_pwrite)                                                                                  \
    X(aio_flush)                                                                                   \
    X(aio_trim)                                                                                    \
    X(aio_zero)                                                                                    \
    X(aio_block_status)                                                                            \
    X(aio_disconnect)

struct nbd_lib {
#define X(name) __typeof__(nbd_##name) *name;
    NBD_LIB_FUNCTIONS(X)
#undef X
};

/* The library, loaded at most once.  Any thread.  NULL with an error when it is not there. */
const struct nbd_lib *nbd_lib_get(struct err *e);

#endif
