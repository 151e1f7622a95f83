/* A disk that is full, slow or stuck on demand, for one folder; preload it into a server.
 *
 * DRIFTLINE_FAULTY_FOLDER names the folder and DRIFTLINE_FAULTY_MODE a file whose first letter says
 * what happens to every write below it: f(ull): ENOSPC, s(low): half a second each, h(ang): not
 * before the letter changes. Anything else, or no such file: nothing. Files of other folders cost
 * one look into a table.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MAX_FILES 65536
static volatile char watched[MAX_FILES];

static char mode_now(void) {
    const char *path = getenv("DRIFTLINE_FAULTY_MODE");
    char letter = 0;
    if (!path) return 0;
    int file = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    if (syscall(SYS_read, file, &letter, 1) != 1) letter = 0;
    syscall(SYS_close, file);
    return letter;
}

/* -1: the write fails. */
static int suffer(int file) {
    struct timespec half = {0, 500000000};
    if (file < 0 || file >= MAX_FILES || !watched[file]) return 0;
    switch (mode_now()) {
    case 'f':
        errno = ENOSPC;
        return -1;
    case 's':
        nanosleep(&half, NULL);
        return 0;
    case 'h':
        while (mode_now() == 'h') nanosleep(&half, NULL);
        return 0;
    }
    return 0;
}

static int watch(int file, const char *path) {
    const char *folder = getenv("DRIFTLINE_FAULTY_FOLDER");
    if (file >= 0 && file < MAX_FILES)
        watched[file] = folder && path && !strncmp(path, folder, strlen(folder));
    return file;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return watch(real(path, flags, mode), path); \
    }

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return watch(real(folder, path, flags, mode), path); \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *bytes, size_t size) {
    REAL(write);
    return suffer(file) ? -1 : real(file, bytes, size);
}

ssize_t pwrite(int file, const void *bytes, size_t size, off_t at) {
    REAL(pwrite);
    return suffer(file) ? -1 : real(file, bytes, size, at);
}

ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t at) {
    REAL(pwrite64);
    return suffer(file) ? -1 : real(file, bytes, size, at);
}

ssize_t writev(int file, const struct iovec *parts, int number) {
    REAL(writev);
    return suffer(file) ? -1 : real(file, parts, number);
}

int close(int file) {
    REAL(close);
    if (file >= 0 && file < MAX_FILES) watched[file] = 0;
    return real(file);
}
