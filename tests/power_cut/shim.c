/* Preloaded into a broker: keeps beside the volume with its data directory what a power cut would leave of it.
 *
 * The model is POSIX's. The data of a file, and its size, survive once fsync or fdatasync has answered for that file; which
 * names a directory holds (creations, renames, removals) survives once fsync has answered for that directory. Whatever else
 * was written is gone. sync_file_range promises nothing.
 *
 *   POWER_CUT_VOLUME   the volume: a directory that stands for a whole disk, as an absolute path without links
 *   POWER_CUT_SHADOW   where what survives is kept:
 *       files/<id>     the synced contents of a file
 *       dirs/<id>      the synced entries of a directory, one a line: "f <id> <name>" or "d <id> <name>"
 *   POWER_CUT_JOURNAL  if set, the sync of a new file makes its directory's entries survive as well, as on ext4 and XFS
 *   POWER_CUT_SYNC_US  how many microseconds longer a sync takes than here, so that more is on its way when the power fails
 *   POWER_CUT_AT_SYNC  if set, the process ends with this sync (the first is 1), before any of it survives
 *
 * An id is "<inode>.<n>", for inode numbers are used again: the highest <n> is the one that has the number now. The shadow of
 * everything that is there before the process starts is laid by whoever starts it, with n = 0.
 *
 * At any instant the shadow is a state that a power cut may leave, so the process may be killed at any instant: entries are
 * replaced as a whole, and a file that is half copied is one whose sync was under way.
 *
 * The kernel is called directly, so nothing here depends on what else is loaded. A way of changing files that is not known
 * here ends the process when its result is met (a file without a shadow); mapped memory that is written to would not be
 * noticed, and nothing here may use it.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define BUCKETS 1024
#define MOST_RANGES 4096
#define COPY_BYTES (256 * 1024)

struct range {
    off_t from, until;
};

/* A file that was opened for writing. */
struct file {
    struct file *next;
    ino_t inode;
    int is_new;         /* its name was never synced */
    off_t cut_to;       /* the smallest size since the last sync, or -1 */
    struct range *dirty; /* what was written since the last sync */
    size_t dirty_count, dirty_room;
};

static const char *volume, *shadow;
static size_t volume_length;
static int journal;
static useconds_t sync_us;
static long syncs, last_sync;
static dev_t device;
static struct file *files[BUCKETS];

/* Taken in this order. `syncing` is held for a whole sync, so that one that finds nothing to do does not overtake another
 * that is still at it; `names` guards the table above, and that a listing sees all of a rename or creation, or none. */
static pthread_mutex_t syncing = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t names = PTHREAD_MUTEX_INITIALIZER;

static void give_up(const char *what, const char *about) {
    dprintf(2, "power cut shim: %s %s: %s\n", what, about, strerror(errno));
    abort();
}

__attribute__((constructor)) static void begin(void) {
    struct stat status;
    volume = getenv("POWER_CUT_VOLUME");
    shadow = getenv("POWER_CUT_SHADOW");
    journal = getenv("POWER_CUT_JOURNAL") != NULL;
    if (volume == NULL || shadow == NULL) {
        volume = NULL;
        return;
    }
    volume_length = strlen(volume);
    if (getenv("POWER_CUT_SYNC_US") != NULL) sync_us = atoi(getenv("POWER_CUT_SYNC_US"));
    if (getenv("POWER_CUT_AT_SYNC") != NULL) last_sync = atol(getenv("POWER_CUT_AT_SYNC"));
    if (syscall(SYS_newfstatat, AT_FDCWD, volume, &status, 0) != 0) give_up("no volume at", volume);
    device = status.st_dev;
}

static int status_of(int fd, struct stat *status) {
    return volume != NULL && syscall(SYS_fstat, fd, status) == 0 && status->st_dev == device;
}

/* The path of a descriptor, if it is the volume or in it. */
static int path_within(int fd, char path[PATH_MAX]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length < (ssize_t)volume_length) return 0;
    path[length] = 0;
    return memcmp(path, volume, volume_length) == 0 && (path[volume_length] == '/' || path[volume_length] == 0);
}

/* Where the shadow of the n-th thing with an inode number is. `kind` is "files" or "dirs". */
static void shadow_path(char path[PATH_MAX], const char *kind, ino_t inode, unsigned n) {
    snprintf(path, PATH_MAX, "%s/%s/%llu.%u", shadow, kind, (unsigned long long)inode, n);
}

/* How many things had this inode number so far. */
static unsigned shadows(const char *kind, ino_t inode) {
    char path[PATH_MAX];
    for (unsigned n = 0;; n++) {
        shadow_path(path, kind, inode, n);
        if (syscall(SYS_faccessat, AT_FDCWD, path, F_OK) != 0) return n;
    }
}

/* Lays the empty shadow of what was just created. */
static void create_shadow(const char *kind, ino_t inode) {
    char path[PATH_MAX];
    shadow_path(path, kind, inode, shadows(kind, inode));
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) give_up("cannot create", path);
    close(fd);
}

/* The functions down to `synced` are called with `names` held. */

static struct file *find(ino_t inode) {
    struct file *file = files[inode % BUCKETS];
    while (file != NULL && file->inode != inode) file = file->next;
    return file;
}

static void opened(const struct stat *status, int created, int emptied) {
    struct file *file = find(status->st_ino);
    if (file == NULL) {
        file = calloc(1, sizeof *file);
        if (file == NULL) give_up("no memory for", "a file");
        file->inode = status->st_ino;
        file->cut_to = -1;
        file->next = files[file->inode % BUCKETS];
        files[file->inode % BUCKETS] = file;
    }
    if (created) {
        file->is_new = 1;
        file->cut_to = -1;
        file->dirty_count = 0;
        create_shadow("files", file->inode);
    } else if (emptied) {
        file->cut_to = 0;
    }
}

static void wrote(ino_t inode, off_t from, off_t until) {
    struct file *file = find(inode);
    if (file == NULL || from >= until) return;
    struct range *last = file->dirty_count > 0 ? &file->dirty[file->dirty_count - 1] : NULL;
    if (last != NULL && (file->dirty_count == MOST_RANGES || (from <= last->until && until >= last->from))) {
        if (from < last->from) last->from = from;
        if (until > last->until) last->until = until;
        return;
    }
    if (file->dirty_count == file->dirty_room) {
        file->dirty_room = file->dirty_room * 2 + 16;
        file->dirty = realloc(file->dirty, file->dirty_room * sizeof *file->dirty);
        if (file->dirty == NULL) give_up("no memory for", "what was written");
    }
    file->dirty[file->dirty_count++] = (struct range){from, until};
}

/* Replaces the entries that survive of a directory by those that it has. */
static void sync_entries(const char *path) {
    static char target[PATH_MAX], fresh[PATH_MAX + 8];
    struct stat status;
    DIR *directory = opendir(path);
    if (directory == NULL) return; /* removed in the meantime */
    if (fstat(dirfd(directory), &status) != 0) give_up("cannot look at", path);
    unsigned known = shadows("dirs", status.st_ino);
    if (known == 0) give_up("a directory was created unseen:", path);
    shadow_path(target, "dirs", status.st_ino, known - 1);
    snprintf(fresh, sizeof fresh, "%s.fresh", target);
    FILE *out = fopen(fresh, "w");
    if (out == NULL) give_up("cannot create", fresh);
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if (fstatat(dirfd(directory), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) != 0) give_up("cannot look at", path);
        if (S_ISSOCK(status.st_mode)) continue; /* holds nothing, and is made anew at every start */
        int is_dir = S_ISDIR(status.st_mode);
        known = shadows(is_dir ? "dirs" : "files", status.st_ino);
        if (known == 0) give_up("a file was created unseen:", entry->d_name);
        unsigned long long inode = status.st_ino;
        fprintf(out, "%c %llu.%u %s\n", is_dir ? 'd' : 'f', inode, known - 1, entry->d_name);
    }
    closedir(directory);
    if (fclose(out) != 0 || syscall(SYS_renameat, AT_FDCWD, fresh, AT_FDCWD, target) != 0) give_up("cannot write", target);
}

/* The rest is called with neither lock held, or with `syncing`. */

static void copy(int from_fd, int to_fd, struct range range) {
    static char buffer[COPY_BYTES];
    while (range.from < range.until) {
        size_t wanted = range.until - range.from < COPY_BYTES ? range.until - range.from : COPY_BYTES;
        ssize_t got = syscall(SYS_pread64, from_fd, buffer, wanted, range.from);
        if (got < 0) give_up("cannot read", "what is to be synced");
        if (got == 0) return; /* it was cut short since */
        if (syscall(SYS_pwrite64, to_fd, buffer, (size_t)got, range.from) != got) give_up("cannot write", "what is synced");
        range.from += got;
    }
}

/* What was written to a file survives from now on. */
static void sync_contents(int fd, const struct stat *status) {
    char path[PATH_MAX], link[64];
    pthread_mutex_lock(&names);
    struct file *file = find(status->st_ino);
    if (file == NULL || (file->dirty_count == 0 && file->cut_to < 0 && !file->is_new)) {
        pthread_mutex_unlock(&names);
        return;
    }
    struct file taken = *file;
    file->dirty = NULL;
    file->dirty_count = file->dirty_room = 0;
    file->cut_to = -1;
    shadow_path(path, "files", status->st_ino, shadows("files", status->st_ino) - 1);
    pthread_mutex_unlock(&names);

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int from = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC);
    int to = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CLOEXEC);
    if (from < 0 || to < 0) give_up("cannot open", path);
    if (taken.cut_to >= 0 && syscall(SYS_ftruncate, to, taken.cut_to) != 0) give_up("cannot cut", path);
    for (size_t at = 0; at < taken.dirty_count; at++) copy(from, to, taken.dirty[at]);
    struct stat now;
    if (syscall(SYS_fstat, from, &now) != 0 || syscall(SYS_ftruncate, to, now.st_size) != 0) give_up("cannot size", path);
    close(from);
    close(to);
    free(taken.dirty);

    if (journal && taken.is_new && path_within(fd, path)) {
        *strrchr(path, '/') = 0;
        pthread_mutex_lock(&names);
        sync_entries(path);
        file = find(status->st_ino);
        if (file != NULL) file->is_new = 0;
        pthread_mutex_unlock(&names);
    }
}

static int synced(int fd, long call) {
    struct stat status;
    char path[PATH_MAX];
    if (!status_of(fd, &status)) return syscall(call, fd);
    if (sync_us > 0) usleep(sync_us);
    pthread_mutex_lock(&syncing);
    if (++syncs == last_sync) kill(getpid(), SIGKILL);
    int result = syscall(call, fd);
    if (result == 0 && S_ISREG(status.st_mode)) sync_contents(fd, &status);
    if (result == 0 && S_ISDIR(status.st_mode) && path_within(fd, path)) {
        pthread_mutex_lock(&names);
        sync_entries(path);
        pthread_mutex_unlock(&names);
    }
    pthread_mutex_unlock(&syncing);
    return result;
}

static int open_noted(int at, const char *path, int flags, mode_t mode) {
    struct stat status;
    char real[PATH_MAX];
    if (volume == NULL || (flags & (O_ACCMODE | O_CREAT | O_TRUNC)) == O_RDONLY || (flags & O_TMPFILE) == O_TMPFILE)
        return syscall(SYS_openat, at, path, flags, mode);
    pthread_mutex_lock(&names);
    int existed = syscall(SYS_newfstatat, at, path, &status, 0) == 0;
    int fd = syscall(SYS_openat, at, path, flags, mode);
    int error = errno;
    if (fd >= 0 && status_of(fd, &status) && S_ISREG(status.st_mode) && path_within(fd, real))
        opened(&status, !existed, (flags & O_TRUNC) != 0);
    pthread_mutex_unlock(&names);
    errno = error;
    return fd;
}

/* Notes a write of `written` bytes at `from`, or, if that is -1, up to where the descriptor is now. */
static ssize_t write_noted(int fd, off_t from, ssize_t written) {
    struct stat status;
    int error = errno;
    if (written > 0 && status_of(fd, &status) && S_ISREG(status.st_mode)) {
        if (from < 0) from = syscall(SYS_lseek, fd, 0, SEEK_CUR) - written;
        pthread_mutex_lock(&names);
        wrote(status.st_ino, from, from + written);
        pthread_mutex_unlock(&names);
    }
    errno = error;
    return written;
}

static int cut_noted(const struct stat *status, off_t size) {
    pthread_mutex_lock(&names);
    struct file *file = find(status->st_ino);
    if (file != NULL && (file->cut_to < 0 || size < file->cut_to)) file->cut_to = size;
    pthread_mutex_unlock(&names);
    return 0;
}

/* A change of names, which a listing must not see half of. */
static int renamed(int result) {
    int error = errno;
    pthread_mutex_unlock(&names);
    errno = error;
    return result;
}
#define NAMES(...) (pthread_mutex_lock(&names), renamed(syscall(__VA_ARGS__)))

static mode_t mode_of(int flags, va_list arguments) {
    return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(arguments, mode_t) : 0;
}

#define OPEN(NAME)                                              \
    EXPORT int NAME(const char *path, int flags, ...) {         \
        va_list arguments;                                      \
        va_start(arguments, flags);                             \
        mode_t mode = mode_of(flags, arguments);                \
        va_end(arguments);                                      \
        return open_noted(AT_FDCWD, path, flags, mode);         \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(NAME)                                            \
    EXPORT int NAME(int at, const char *path, int flags, ...) { \
        va_list arguments;                                      \
        va_start(arguments, flags);                             \
        mode_t mode = mode_of(flags, arguments);                \
        va_end(arguments);                                      \
        return open_noted(at, path, flags, mode);               \
    }
OPENAT(openat)
OPENAT(openat64)

EXPORT int __open_2(const char *path, int flags) { return open_noted(AT_FDCWD, path, flags, 0); }
EXPORT int __open64_2(const char *path, int flags) { return open_noted(AT_FDCWD, path, flags, 0); }
EXPORT int creat(const char *path, mode_t mode) { return open_noted(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
EXPORT int creat64(const char *path, mode_t mode) { return creat(path, mode); }

EXPORT ssize_t write(int fd, const void *bytes, size_t count) {
    return write_noted(fd, -1, syscall(SYS_write, fd, bytes, count));
}

EXPORT ssize_t writev(int fd, const struct iovec *parts, int count) {
    return write_noted(fd, -1, syscall(SYS_writev, fd, parts, count));
}

EXPORT ssize_t pwrite(int fd, const void *bytes, size_t count, off_t from) {
    return write_noted(fd, from, syscall(SYS_pwrite64, fd, bytes, count, from));
}
EXPORT ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t from) { return pwrite(fd, bytes, count, from); }

EXPORT ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t from) {
    return write_noted(fd, from, syscall(SYS_pwritev, fd, parts, count, from, 0));
}
EXPORT ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t from) {
    return pwritev(fd, parts, count, from);
}

EXPORT int ftruncate(int fd, off_t size) {
    struct stat status;
    int result = syscall(SYS_ftruncate, fd, size);
    return result == 0 && status_of(fd, &status) ? cut_noted(&status, size) : result;
}
EXPORT int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

EXPORT int truncate(const char *path, off_t size) {
    int fd = open_noted(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0) return -1;
    int result = ftruncate(fd, size), error = errno;
    close(fd);
    errno = error;
    return result;
}
EXPORT int truncate64(const char *path, off64_t size) { return truncate(path, size); }

/* Room alone is nothing that could be lost, a new size is (it is noted as an empty cut), and so is what is zeroed. */
EXPORT int fallocate(int fd, int mode, off_t from, off_t length) {
    struct stat before, after;
    int known = status_of(fd, &before);
    int result = syscall(SYS_fallocate, fd, mode, from, length);
    if (result != 0 || !known || !status_of(fd, &after)) return result;
    if (after.st_size != before.st_size) cut_noted(&after, before.st_size);
    if ((mode & ~FALLOC_FL_KEEP_SIZE) != 0) write_noted(fd, from, length);
    return 0;
}
EXPORT int fallocate64(int fd, int mode, off64_t from, off64_t length) { return fallocate(fd, mode, from, length); }

EXPORT int posix_fallocate(int fd, off_t from, off_t length) { return fallocate(fd, 0, from, length) == 0 ? 0 : errno; }
EXPORT int posix_fallocate64(int fd, off64_t from, off64_t length) { return posix_fallocate(fd, from, length); }

EXPORT int fsync(int fd) { return synced(fd, SYS_fsync); }
EXPORT int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

EXPORT ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t length, unsigned flags) {
    off_t from = out_at != NULL ? *out_at : -1;
    return write_noted(out, from, syscall(SYS_copy_file_range, in, in_at, out, out_at, length, flags));
}
EXPORT ssize_t sendfile(int out, int in, off_t *at, size_t count) {
    return write_noted(out, -1, syscall(SYS_sendfile, out, in, at, count));
}
EXPORT ssize_t sendfile64(int out, int in, off64_t *at, size_t count) { return sendfile(out, in, at, count); }

EXPORT int mkdirat(int at, const char *path, mode_t mode) {
    struct stat status;
    char real[PATH_MAX];
    pthread_mutex_lock(&names);
    int result = syscall(SYS_mkdirat, at, path, mode), error = errno;
    int fd = result == 0 && volume != NULL ? syscall(SYS_openat, at, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (fd >= 0 && status_of(fd, &status) && path_within(fd, real)) create_shadow("dirs", status.st_ino);
    if (fd >= 0) close(fd);
    pthread_mutex_unlock(&names);
    errno = error;
    return result;
}
EXPORT int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

EXPORT int rename(const char *from, const char *to) { return NAMES(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to); }
EXPORT int renameat(int from_at, const char *from, int to_at, const char *to) {
    return NAMES(SYS_renameat, from_at, from, to_at, to);
}
EXPORT int link(const char *from, const char *to) { return NAMES(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0); }
EXPORT int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
    return NAMES(SYS_linkat, from_at, from, to_at, to, flags);
}
EXPORT int unlink(const char *path) { return NAMES(SYS_unlinkat, AT_FDCWD, path, 0); }
EXPORT int unlinkat(int at, const char *path, int flags) { return NAMES(SYS_unlinkat, at, path, flags); }
EXPORT int rmdir(const char *path) { return NAMES(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR); }
