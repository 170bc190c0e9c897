/* SPDX-License-Identifier: MIT */
/* Taking a mount away: directly where we may, else through fusermount3, which is set-uid. */
#include "export/fuse/export.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static int by_helper(const char *mountpoint, bool lazy) {
    char *const args[] = {"fusermount3", "-u", lazy ? "-qz" : "-q", "--", (char *)mountpoint, NULL};
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, 2, "/dev/null", O_WRONLY, 0);
    pid_t pid;
    int rc = -posix_spawnp(&pid, args[0], &files, NULL, args, environ);
    posix_spawn_file_actions_destroy(&files);
    int status = 0;
    while (rc == 0 && waitpid(pid, &status, 0) < 0)
        rc = errno == EINTR ? 0 : -errno;
    /* It tells no reasons apart; a mount of ours that cannot go is one in use. */
    return rc == 0 && status ? -EBUSY : rc;
}

int fuse_unmount_path(const char *mountpoint, bool lazy) {
    if (umount2(mountpoint, UMOUNT_NOFOLLOW | (lazy ? MNT_DETACH : 0)) == 0)
        return 0;
    int error = errno;
    return error == EPERM ? by_helper(mountpoint, lazy) : -error;
}
