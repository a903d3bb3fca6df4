/* Preloaded, it makes each sync of a file take SLOW_FSYNC_SECONDS longer: a slow disk.
   cc -shared -fPIC -O1 -o slow_fsync.so slow_fsync.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

static int late(const char *name, int descriptor) {
    const char *text = getenv("SLOW_FSYNC_SECONDS");
    double seconds = text ? atof(text) : 0.1;
    struct timespec pause = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    nanosleep(&pause, NULL);
    return sync(descriptor);
}

int fsync(int descriptor) { return late("fsync", descriptor); }
int fdatasync(int descriptor) { return late("fdatasync", descriptor); }
