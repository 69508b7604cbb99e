// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Tracks the descriptors that programs open on the watched superblocks.
 * Probe-only: nothing here changes what the kernel does.
 *
 * Programs only: each unpacks its context and calls a handler of track.bpf.h.
 * Those in SEC("?...") are loaded where the kernel has the tracepoint (arm64
 * has neither open, creat nor dup2).
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#include "rclone_bypass.h"
#include "maps.bpf.h"
#include "track.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define ENTER_OPEN(name, section)                                     \
	SEC(section "tracepoint/syscalls/sys_enter_" #name)           \
	int tp_enter_##name(struct trace_event_raw_sys_enter *ctx)    \
	{                                                             \
		return handle_enter_open();                           \
	}

#define EXIT_NEW_FD(name, section, kind)                              \
	SEC(section "tracepoint/syscalls/sys_exit_" #name)            \
	int tp_exit_##name(struct trace_event_raw_sys_exit *ctx)      \
	{                                                             \
		return handle_new_fd(ctx->ret, kind);                 \
	}

ENTER_OPEN(openat, "")
ENTER_OPEN(openat2, "")
ENTER_OPEN(open, "?")
ENTER_OPEN(creat, "?")

EXIT_NEW_FD(openat, "", VB_EVENT_OPEN)
EXIT_NEW_FD(openat2, "", VB_EVENT_OPEN)
EXIT_NEW_FD(open, "?", VB_EVENT_OPEN)
EXIT_NEW_FD(creat, "?", VB_EVENT_OPEN)
EXIT_NEW_FD(dup, "", VB_EVENT_DUP)
EXIT_NEW_FD(dup2, "?", VB_EVENT_DUP)
EXIT_NEW_FD(dup3, "", VB_EVENT_DUP)

SEC("tracepoint/syscalls/sys_enter_close")
int tp_enter_close(struct trace_event_raw_sys_enter *ctx)
{
	return handle_enter_close((__u32)ctx->args[0]);
}

SEC("tracepoint/syscalls/sys_exit_close")
int tp_exit_close(struct trace_event_raw_sys_exit *ctx)
{
	return handle_exit_close();
}

SEC("tracepoint/sched/sched_process_exit")
int tp_sched_process_exit(void *ctx)
{
	return handle_thread_exit();
}
