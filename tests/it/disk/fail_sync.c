/* Preloaded into a broker: while the file named by FAIL_SYNC_FLAG exists, nothing can be synced. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fails(void) {
    const char *flag = getenv("FAIL_SYNC_FLAG");
    return flag != NULL && access(flag, F_OK) == 0;
}

static int answer(long number, int fd) {
    if (fails()) {
        errno = EIO;
        return -1;
    }
    return (int)syscall(number, fd);
}

__attribute__((visibility("default"))) int fsync(int fd) { return answer(SYS_fsync, fd); }

__attribute__((visibility("default"))) int fdatasync(int fd) { return answer(SYS_fdatasync, fd); }
