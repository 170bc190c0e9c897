/* SPDX-License-Identifier: MIT */
/* Facts: loop(4), linux/loop.h (LOOP_CONFIGURE since Linux 5.8). */
#include "export/loopdev.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "base/cleanup.h"
#include "base/err.h"

#define TRIES 50 /* others take the free device that we were told of */

int loopdev_attach(const char *file, bool read_only, bool autoclear, char *name, size_t room,
                   struct err *e) {
    AUTO_FD int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    if (control < 0) {
        err_errno(e, errno, "/dev/loop-control");
        err_hint(e, "block devices need root, and the kernel's loop module");
        return err_status(e);
    }
    AUTO_FD int backing = open(file, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    if (backing < 0)
        return err_errno(e, errno, "%s", file);
    struct loop_config config = {.fd = (__u32)backing, .block_size = 512};
    config.info.lo_flags = (read_only ? LO_FLAGS_READ_ONLY : 0) | LO_FLAGS_PARTSCAN |
                           (autoclear ? LO_FLAGS_AUTOCLEAR : 0);
    snprintf((char *)config.info.lo_file_name, LO_NAME_SIZE, "%s", file);
    for (int i = 0; i < TRIES; i++) {
        int number = ioctl(control, LOOP_CTL_GET_FREE);
        if (number < 0)
            return err_errno(e, errno, "no free loop device");
        snprintf(name, room, "/dev/loop%d", number);
        int fd = open(name, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
        if (fd < 0)
            return err_errno(e, errno, "%s", name);
        if (ioctl(fd, LOOP_CONFIGURE, &config) == 0)
            return fd;
        int error = errno;
        close(fd);
        if (error != EBUSY)
            return err_errno(e, error, "%s over %s", name, file);
    }
    return err_set(e, EBUSY, "no loop device stayed free for %d tries", TRIES);
}
