// SPDX-License-Identifier: Apache-2.0
//
// The whole user space of the lab's test guest: a static init that stands in for a DBMS.
//
// It fills memory with 16 KiB frames, most of them copies of frames of its data disk (/dev/vda), tells
// through its mailbox disk (/dev/vdb) which guest-physical page holds which bytes of the data disk, and
// dirties frames at a given rate on demand. Kernel command line:
//
//   ndm.fill=MB     memory to fill         ndm.mapped=PERCENT  frames that are read from the disk
//   ndm.seed=N      of every random choice ndm.zero=PERCENT    frames that stay zero (the rest: own content)
//   ndm.thp=0|1     transparent huge pages for the fill
//
// ttyS0 is the kernel's console, ttyS1 takes commands (one line each, one line of answer, "ok ..." or
// "error ..."), the third port carries heartbeats and is driven by port I/O, without the kernel.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <linux/fs.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define FRAME 16384UL
#define PAGES_PER_FRAME (FRAME / PAGE)
#define BEAT_PORT 0x3e8
#define RUN_FRAMES 64 /* frames in one preadv: 1 MiB */

struct mailbox_header {
	char magic[8];
	uint64_t count;    /* pairs that follow, from the next 4 KiB on */
	uint64_t sequence; /* counts the maps that were written */
};

struct pair {
	uint64_t gpa;
	uint64_t offset;
};

static uint8_t *memory;
static uint64_t frames, disk_frames;
static uint32_t *order;     /* a random permutation of the frames */
static int64_t *disk_frame; /* per frame: the disk frame it was read from, or -1 */
static int console = -1, commands = -1;

static void say(int fd, const char *format, ...)
{
	char line[512];
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(line, sizeof line - 1, format, arguments);
	va_end(arguments);
	if (length > (int)sizeof line - 2)
		length = sizeof line - 2;
	line[length++] = '\n';
	for (char *at = line; length > 0;) {
		ssize_t n = write(fd, at, length);
		if (n <= 0)
			return;
		at += n;
		length -= n;
	}
}

static void die(const char *what)
{
	say(console, "guest: %s: %s", what, strerror(errno));
	if (commands >= 0)
		say(commands, "error %s: %s", what, strerror(errno));
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static uint64_t next_random(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15ULL);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

static uint64_t below(uint64_t *state, uint64_t limit)
{
	return (uint64_t)(((unsigned __int128)next_random(state) * limit) >> 64);
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static long parameter(const char *name, long fallback)
{
	char text[4096], key[64];
	int fd = open("/proc/cmdline", O_RDONLY);
	ssize_t length = read(fd, text, sizeof text - 1);
	close(fd);
	if (length < 0)
		return fallback;
	text[length] = 0;
	snprintf(key, sizeof key, "ndm.%s=", name);
	char *at = strstr(text, key);
	return at ? atol(at + strlen(key)) : fallback;
}

static void write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		say(console, "guest: %s: %s", path, strerror(errno));
	if (fd >= 0)
		close(fd);
}

/* ---- start ---------------------------------------------------------------------------------- */

static void load_modules(void)
{
	char name[128], path[160];
	FILE *list = fopen("/modules/list", "r");
	if (!list)
		die("/modules/list");
	while (fscanf(list, "%127s", name) == 1) {
		snprintf(path, sizeof path, "/modules/%s", name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
			die(path);
		close(fd);
	}
	fclose(list);
}

static int open_disk(const char *path, int flags)
{
	for (int attempt = 0; attempt < 2000; attempt++) {
		int fd = open(path, flags | O_DIRECT | O_CLOEXEC);
		if (fd >= 0)
			return fd;
		usleep(5000); /* the probe of the PCI device may still be under way */
	}
	die(path);
	return -1;
}

static int open_port(const char *path)
{
	struct termios mode;
	int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (fd < 0 || tcgetattr(fd, &mode) < 0)
		die(path);
	cfmakeraw(&mode);
	mode.c_cflag |= CLOCAL;
	cfsetspeed(&mode, B115200);
	tcsetattr(fd, TCSANOW, &mode);
	return fd;
}

/* ---- memory --------------------------------------------------------------------------------- */

static void fill_own(uint8_t *at, size_t length, uint64_t *state)
{
	uint64_t x = next_random(state) | 1; /* xorshift never leaves a non-zero state for zero */
	for (uint64_t *word = (uint64_t *)at, *end = word + length / 8; word < end; word++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		*word = x;
	}
}

/* Reads `count` disk frames from `first` on into the memory frames order[from...]. */
static void read_run(int fd, uint64_t first, uint64_t from, int count)
{
	struct iovec parts[RUN_FRAMES];
	for (int i = 0; i < count; i++) {
		uint32_t frame = order[from + i];
		parts[i].iov_base = memory + frame * FRAME;
		parts[i].iov_len = FRAME;
		disk_frame[frame] = first + i;
	}
	if (preadv(fd, parts, count, first * FRAME) != (ssize_t)(count * FRAME))
		die("cannot read the data disk");
}

static void allocate(int disk, long megabytes, int huge)
{
	uint64_t size = 0;
	frames = (megabytes > 0 ? megabytes : 1) * 1024UL * 1024 / FRAME;
	if (ioctl(disk, BLKGETSIZE64, &size) < 0)
		die("size of the data disk");
	disk_frames = size / FRAME;
	memory = mmap(NULL, frames * FRAME, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	order = malloc(frames * sizeof *order);
	disk_frame = malloc(frames * sizeof *disk_frame);
	if (memory == MAP_FAILED || !order || !disk_frame)
		die("memory");
	if (huge)
		madvise(memory, frames * FRAME, MADV_HUGEPAGE);
	/* A touch in an order of its own makes physical order differ from both virtual and disk order. */
	for (uint64_t i = 0; i < frames; i++)
		for (uint64_t page = 0; page < FRAME; page += PAGE)
			*(volatile uint8_t *)(memory + (i * 7919) % frames * FRAME + page) = 0;
	for (uint64_t i = 0; i < frames * PAGES_PER_FRAME; i++)
		*(volatile uint8_t *)(memory + i * PAGE) = 0;
	if (mlockall(MCL_CURRENT) < 0)
		die("mlockall");
}

static void shuffle(uint64_t *state)
{
	for (uint64_t i = frames - 1; i > 0; i--) {
		uint64_t j = below(state, i + 1);
		uint32_t swap = order[i];
		order[i] = order[j];
		order[j] = swap;
	}
}

/* Gives all frames their content; false if the disk has too few. Can be done again and again. */
static int fill(int disk, long mapped, long zero, uint64_t seed)
{
	uint64_t state = seed, from_disk = frames * mapped / 100, stay_zero = frames * zero / 100;
	if (from_disk > disk_frames || from_disk + stay_zero > frames)
		return 0;
	for (uint64_t i = 0; i < frames; i++) {
		order[i] = i;
		disk_frame[i] = -1;
	}
	shuffle(&state);

	/* Selection sampling: from_disk of the disk's frames, in disk order, into random memory frames. */
	uint64_t chosen = 0, first = 0;
	int run = 0;
	for (uint64_t frame = 0; frame < disk_frames && chosen < from_disk; frame++) {
		if (below(&state, disk_frames - frame) >= from_disk - chosen)
			continue;
		if (run && (run == RUN_FRAMES || frame != first + run)) {
			read_run(disk, first, chosen - run, run);
			run = 0;
		}
		if (!run)
			first = frame;
		run++;
		chosen++;
	}
	if (run)
		read_run(disk, first, chosen - run, run);
	for (uint64_t i = from_disk; i < frames; i++) {
		if (i < from_disk + stay_zero)
			memset(memory + order[i] * FRAME, 0, FRAME);
		else
			fill_own(memory + order[i] * FRAME, FRAME, &state);
	}
	return 1;
}

static uint64_t checksum(void)
{
	uint64_t sum[4] = {1, 2, 3, 4};
	const uint64_t *word = (const uint64_t *)memory, *end = word + frames * FRAME / 8;
	for (; word < end; word += 4)
		for (int lane = 0; lane < 4; lane++)
			sum[lane] = (sum[lane] ^ word[lane]) * 0x100000001b3ULL + (sum[lane] >> 47);
	return sum[0] ^ (sum[1] * 3) ^ (sum[2] * 5) ^ (sum[3] * 7);
}

/* ---- the buffer map ------------------------------------------------------------------------- */

static void write_whole(int fd, const void *data, size_t length, off_t offset)
{
	for (size_t done = 0; done < length;) {
		ssize_t n = pwrite(fd, (const char *)data + done, length - done, offset + done);
		if (n <= 0)
			die("cannot write the mailbox");
		done += n;
	}
}

static uint64_t write_map(int mailbox)
{
	static uint64_t sequence;
	uint64_t pages = frames * PAGES_PER_FRAME, count = 0;
	size_t room = (pages * sizeof(struct pair) + PAGE - 1) / PAGE * PAGE;
	struct pair *pairs = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct mailbox_header *header =
		mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t *entries = malloc(pages * sizeof *entries);
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pairs == MAP_FAILED || header == MAP_FAILED || !entries || pagemap < 0)
		die("pagemap");
	off_t start = (uintptr_t)memory / PAGE * 8;
	for (size_t done = 0, length = pages * 8; done < length;) {
		ssize_t n = pread(pagemap, (char *)entries + done, length - done, start + done);
		if (n <= 0)
			die("pagemap");
		done += n;
	}
	for (uint64_t page = 0; page < pages; page++) {
		int64_t frame = disk_frame[page / PAGES_PER_FRAME];
		if (frame < 0 || !(entries[page] >> 63))
			continue;
		pairs[count].gpa = (entries[page] & ((1ULL << 55) - 1)) * PAGE;
		pairs[count].offset = frame * FRAME + page % PAGES_PER_FRAME * PAGE;
		count++;
	}
	memcpy(header->magic, "NDMMAP1", 8);
	header->count = count;
	header->sequence = ++sequence;
	write_whole(mailbox, pairs, (count * sizeof(struct pair) + PAGE - 1) / PAGE * PAGE, PAGE);
	write_whole(mailbox, header, PAGE, 0);
	fsync(mailbox);
	close(pagemap);
	free(entries);
	munmap(pairs, room);
	munmap(header, PAGE);
	return count;
}

/* ---- dirtying ------------------------------------------------------------------------------- */

enum dirty_mode { TOUCH, FULL, SAME };

static pthread_mutex_t dirty_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t dirty_change = PTHREAD_COND_INITIALIZER;
static double dirty_rate; /* bytes of whole pages a second */
static uint64_t dirty_frames, dirty_pages_total;
static enum dirty_mode dirty_mode;
static int shuffled;

static void dirty_page(uint8_t *page, uint64_t *state)
{
	if (dirty_mode == FULL) {
		fill_own(page, PAGE, state);
	} else if (dirty_mode == SAME) { /* dirty for QEMU, although its content does not change */
		volatile uint64_t *word = (uint64_t *)page;
		*word = *word;
	} else {
		fill_own(page + below(state, PAGE / 64) * 64, 64, state);
	}
}

static void *dirty_loop(void *unused)
{
	uint64_t state = 0xd1b54a32d192ed03ULL;
	double last = now(), debt = 0;
	(void)unused;
	pthread_mutex_lock(&dirty_lock);
	for (;;) {
		if (dirty_rate <= 0) {
			pthread_cond_wait(&dirty_change, &dirty_lock);
			last = now();
			debt = 0;
			continue;
		}
		double t = now();
		debt += (t - last) * dirty_rate;
		last = t;
		if (debt > dirty_rate * 0.05) /* never catch up on what a starved vCPU missed */
			debt = dirty_rate * 0.05;
		for (; debt >= FRAME; debt -= FRAME) {
			uint8_t *frame = memory + order[below(&state, dirty_frames)] * FRAME;
			for (uint64_t page = 0; page < FRAME; page += PAGE)
				dirty_page(frame + page, &state);
			dirty_pages_total += PAGES_PER_FRAME;
		}
		pthread_mutex_unlock(&dirty_lock);
		usleep(2000);
		pthread_mutex_lock(&dirty_lock);
	}
	return NULL;
}

static void set_dirty(int share, double megabytes, enum dirty_mode mode)
{
	pthread_mutex_lock(&dirty_lock);
	if (!shuffled) {
		/* order[] is random, but starts with the mapped frames: mix it, so that the chosen share has
		 * mapped, own and zero frames alike. */
		uint64_t state = 0x2545f4914f6cdd1dULL;
		shuffle(&state);
		shuffled = 1;
	}
	dirty_frames = frames * share / 100;
	if (!dirty_frames)
		dirty_frames = 1;
	dirty_rate = share ? megabytes * 1e6 : 0;
	dirty_mode = mode;
	pthread_cond_signal(&dirty_change);
	pthread_mutex_unlock(&dirty_lock);
}

static int refill(int disk, long mapped, long zero, uint64_t seed)
{
	pthread_mutex_lock(&dirty_lock);
	dirty_rate = 0;
	shuffled = 0;
	int done = fill(disk, mapped, zero, seed);
	pthread_mutex_unlock(&dirty_lock);
	return done;
}

/* ---- heartbeats ----------------------------------------------------------------------------- */

static volatile int beating;

static void *beat_loop(void *unused)
{
	struct timespec pace = {0, 1000000};
	(void)unused;
	if (ioperm(BEAT_PORT, 8, 1) < 0)
		die("ioperm");
	outb(0x80, BEAT_PORT + 3); /* divisor 1: 115200 baud */
	outb(1, BEAT_PORT);
	outb(0, BEAT_PORT + 1);
	outb(3, BEAT_PORT + 3);
	outb(0, BEAT_PORT + 1); /* no interrupts */
	outb(0, BEAT_PORT + 2); /* no FIFO: what is written is out */
	for (;;) {
		if (beating && inb(BEAT_PORT + 5) & 0x20)
			outb('.', BEAT_PORT);
		if (!beating)
			usleep(10000);
		else
			clock_nanosleep(CLOCK_MONOTONIC, 0, &pace, NULL);
	}
	return NULL;
}

static void start_thread(void *(*body)(void *), int priority)
{
	pthread_t thread;
	struct sched_param parameter = {.sched_priority = priority};
	if (pthread_create(&thread, NULL, body, NULL))
		die("pthread_create");
	if (priority && pthread_setschedparam(thread, SCHED_FIFO, &parameter))
		die("pthread_setschedparam");
}

/* ---- commands ------------------------------------------------------------------------------- */

static void obey(char *line, int disk, int mailbox)
{
	char mode[16] = "touch";
	int share;
	long mapped, zero, seed;
	double rate;
	if (sscanf(line, "dirty %d %lf %15s", &share, &rate, mode) >= 2) {
		set_dirty(share, rate, !strcmp(mode, "full") ? FULL : !strcmp(mode, "same") ? SAME : TOUCH);
		say(commands, "ok %llu", (unsigned long long)dirty_pages_total);
	} else if (sscanf(line, "fill %ld %ld %ld", &mapped, &zero, &seed) == 3) {
		if (refill(disk, mapped, zero, seed))
			say(commands, "ok %llu", (unsigned long long)write_map(mailbox));
		else
			say(commands, "error more frames than there are");
	} else if (!strcmp(line, "map")) {
		say(commands, "ok %llu", (unsigned long long)write_map(mailbox));
	} else if (!strcmp(line, "sum")) {
		say(commands, "ok %016llx", (unsigned long long)checksum());
	} else if (!strncmp(line, "beat ", 5)) {
		beating = !strcmp(line + 5, "on");
		say(commands, "ok");
	} else if (!strcmp(line, "ping")) {
		say(commands, "ok pong");
	} else if (!strcmp(line, "poweroff")) {
		say(commands, "ok");
		reboot(RB_POWER_OFF);
	} else {
		say(commands, "error unknown command: %.100s", line);
	}
}

int main(void)
{
	char line[256];
	size_t length = 0;
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, "");
	mount("proc", "/proc", "proc", 0, "");
	mount("sysfs", "/sys", "sysfs", 0, "");
	console = open("/dev/console", O_WRONLY | O_CLOEXEC);
	commands = open_port("/dev/ttyS1");
	load_modules();
	int huge = parameter("thp", 0);
	write_text("/sys/kernel/mm/transparent_hugepage/enabled", huge ? "madvise" : "never");
	write_text("/proc/sys/vm/compact_unevictable_allowed", "0"); /* compaction moves pages otherwise */
	int disk = open_disk("/dev/vda", O_RDONLY), mailbox = open_disk("/dev/vdb", O_RDWR);
	double start = now();
	allocate(disk, parameter("fill", 256), huge);
	if (!fill(disk, parameter("mapped", 90), parameter("zero", 5), parameter("seed", 7))) {
		errno = ENOSPC;
		die("more mapped and zero frames than there are");
	}
	say(console, "guest: filled in %.2f s, up for %.2f s", now() - start, now());
	write_map(mailbox);
	start_thread(dirty_loop, 0);
	start_thread(beat_loop, 50);
	say(commands, "READY");
	for (;;) {
		char c;
		ssize_t n = read(commands, &c, 1);
		if (n <= 0)
			die("commands");
		if (c == '\n') {
			line[length] = 0;
			obey(line, disk, mailbox);
			length = 0;
		} else if (c != '\r' && length < sizeof line - 1) {
			line[length++] = c;
		}
	}
}
