// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Tracks the descriptors that programs open on the watched superblocks.
 * Probe-only: nothing here changes what the kernel does.
 *
 * Programs only: each unpacks its context and calls a handler. There are three
 * ways to come to system calls, of which user space loads one:
 *   tracepoint  syscalls:sys_{enter,exit}_*; needs tracefs, misses 32-bit calls
 *   raw         the raw sys_{enter,exit}; needs nothing
 *   fentry      the system calls' functions; no cost for any other call
 * Those in SEC("?...") are loaded where the kernel has what they attach to.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#include "rclone_bypass.h"
#include "maps.bpf.h"
#include "task.bpf.h"
#include "track.bpf.h"
#include "calls.bpf.h"
#include "lives.bpf.h"
#include "account.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* The number of the system call that they began; CALLS or more: none of ours. */
static __always_inline __u64 syscall_nr(struct pt_regs *regs)
{
#if defined(__TARGET_ARCH_x86)
	/* As the kernel does: of the register, it takes the lower half alone. */
	return (__u32)regs->orig_ax;
#elif defined(__TARGET_ARCH_arm64)
	return (__u32)regs->syscallno;
#endif
}

/* -- tracepoint -- */

#define TP_ENTER(name)                                                          \
	SEC("?tracepoint/syscalls/sys_enter_" #name)                            \
	int tp_enter_##name(struct trace_event_raw_sys_enter *ctx)              \
	{                                                                       \
		return handle_enter_open();                                     \
	}

#define TP_EXIT(name, kind)                                                     \
	SEC("?tracepoint/syscalls/sys_exit_" #name)                             \
	int tp_exit_##name(struct trace_event_raw_sys_exit *ctx)                \
	{                                                                       \
		struct called call = { .ret = ctx->ret };                       \
                                                                                \
		return handle_exit(kind, &call);                                \
	}

#define TP_READ(name)                                                           \
	SEC("?tracepoint/syscalls/sys_enter_" #name)                            \
	int tp_enter_##name(struct trace_event_raw_sys_enter *ctx)              \
	{                                                                       \
		struct called call = {};                                        \
                                                                                \
		return handle_enter_read(&call);                                \
	}                                                                       \
                                                                                \
	SEC("?tracepoint/syscalls/sys_exit_" #name)                             \
	int tp_exit_##name(struct trace_event_raw_sys_exit *ctx)                \
	{                                                                       \
		struct called call = { .ret = ctx->ret };                       \
                                                                                \
		return handle_exit_read(&call);                                 \
	}

/* -- fentry: the functions take the registers alone -- */

#if defined(__TARGET_ARCH_x86)
#define NATIVE(name) "__x64_sys_" #name
#define COMPAT_PREFIX "__ia32_"
#elif defined(__TARGET_ARCH_arm64)
#define NATIVE(name) "__arm64_sys_" #name
#define COMPAT_PREFIX "__arm64_"
#endif

#define FN_ENTER_OF(id, function)                                               \
	SEC("?fentry/" function)                                                \
	int fn_enter_##id(__u64 *ctx)                                           \
	{                                                                       \
		return handle_enter_open();                                     \
	}

#define FN_EXIT_OF(id, function, kind, is_compat)                               \
	SEC("?fexit/" function)                                                 \
	int fn_exit_##id(__u64 *ctx)                                            \
	{                                                                       \
		struct called call = {                                          \
			.ret = (long)ctx[1],                                    \
			.compat = is_compat,                                    \
		};                                                              \
                                                                                \
		return handle_exit(kind, &call);                                \
	}

#define FN_READ_OF(id, function, is_compat)                                     \
	SEC("?fentry/" function)                                                \
	int fn_enter_##id(__u64 *ctx)                                           \
	{                                                                       \
		struct called call = { .compat = is_compat };                   \
                                                                                \
		return handle_enter_read(&call);                                \
	}                                                                       \
                                                                                \
	SEC("?fexit/" function)                                                 \
	int fn_exit_##id(__u64 *ctx)                                            \
	{                                                                       \
		struct called call = {                                          \
			.ret = (long)ctx[1],                                    \
			.compat = is_compat,                                    \
		};                                                              \
                                                                                \
		return handle_exit_read(&call);                                 \
	}

#define ENTER(name) TP_ENTER(name) FN_ENTER_OF(name, NATIVE(name))
#define EXIT(name, kind) TP_EXIT(name, kind) FN_EXIT_OF(name, NATIVE(name), kind, false)
#define COMPAT_ENTER(name) FN_ENTER_OF(32_##name, COMPAT_PREFIX #name)
#define COMPAT_EXIT(name, kind) FN_EXIT_OF(32_##name, COMPAT_PREFIX #name, kind, true)

ENTER(open)
ENTER(creat)
ENTER(openat)
ENTER(openat2)
ENTER(open_by_handle_at)

EXIT(open, CALL_OPEN)
EXIT(creat, CALL_OPEN)
EXIT(openat, CALL_OPEN)
EXIT(openat2, CALL_OPEN)
EXIT(open_by_handle_at, CALL_OPEN)
EXIT(dup, CALL_DUP)
EXIT(dup2, CALL_DUP)
EXIT(dup3, CALL_DUP)
EXIT(fcntl, CALL_FCNTL)
EXIT(pidfd_getfd, CALL_GETFD)
EXIT(close, CALL_CLOSE)
EXIT(close_range, CALL_CLOSE_RANGE)
EXIT(recvmsg, CALL_RECVMSG)
EXIT(recvmmsg, CALL_RECVMMSG)
EXIT(unshare, CALL_UNSHARE)
EXIT(ioctl, CALL_IOCTL)

/* Where 32-bit programs have a function of their own. */
COMPAT_ENTER(compat_sys_open)
COMPAT_ENTER(compat_sys_openat)
COMPAT_ENTER(compat_sys_open_by_handle_at)
COMPAT_EXIT(compat_sys_open, CALL_OPEN)
COMPAT_EXIT(compat_sys_openat, CALL_OPEN)
COMPAT_EXIT(compat_sys_open_by_handle_at, CALL_OPEN)
COMPAT_EXIT(compat_sys_fcntl, CALL_FCNTL)
COMPAT_EXIT(compat_sys_fcntl64, CALL_FCNTL)
COMPAT_EXIT(compat_sys_recvmsg, CALL_RECVMSG)
COMPAT_EXIT(compat_sys_recvmmsg_time32, CALL_RECVMMSG)
COMPAT_EXIT(compat_sys_recvmmsg_time64, CALL_RECVMMSG)
COMPAT_EXIT(compat_sys_ioctl, CALL_IOCTL)
COMPAT_EXIT(compat_sys_socketcall, CALL_SOCKETCALL)
#if defined(__TARGET_ARCH_x86)
COMPAT_ENTER(sys_creat)
COMPAT_ENTER(sys_openat2)
COMPAT_EXIT(sys_creat, CALL_OPEN)
COMPAT_EXIT(sys_openat2, CALL_OPEN)
COMPAT_EXIT(sys_dup, CALL_DUP)
COMPAT_EXIT(sys_dup2, CALL_DUP)
COMPAT_EXIT(sys_dup3, CALL_DUP)
COMPAT_EXIT(sys_pidfd_getfd, CALL_GETFD)
COMPAT_EXIT(sys_close, CALL_CLOSE)
COMPAT_EXIT(sys_close_range, CALL_CLOSE_RANGE)
COMPAT_EXIT(sys_unshare, CALL_UNSHARE)
#endif

#define READ(name) TP_READ(name) FN_READ_OF(name, NATIVE(name), false)
#define COMPAT_READ(name) FN_READ_OF(32_##name, COMPAT_PREFIX #name, true)

/* Which of these there are, attach.rs knows, too. */
READ(read)
READ(pread64)
READ(readv)
READ(preadv)
READ(preadv2)
COMPAT_READ(compat_sys_preadv)
COMPAT_READ(compat_sys_preadv2)
#if defined(__TARGET_ARCH_x86)
COMPAT_READ(sys_read)
COMPAT_READ(sys_readv)
COMPAT_READ(sys_ia32_pread64)
#elif defined(__TARGET_ARCH_arm64)
COMPAT_READ(compat_sys_aarch32_pread64)
#endif

SEC("?fexit/fd_install")
int fn_install(__u64 *ctx)
{
	__u64 nr = syscall_nr(own_regs());

	return handle_install((struct file *)ctx[1], nr < CALLS ? native_calls[nr] : CALL_NONE);
}

/* -- raw -- */

/* Whether the current system call is of a 32-bit program. */
static __always_inline bool is_compat(struct task_struct *task)
{
#if defined(__TARGET_ARCH_x86)
	/* TS_COMPAT, arch/x86/include/asm/thread_info.h */
	return task->thread_info.status & 2;
#elif defined(__TARGET_ARCH_arm64)
	/* TIF_32BIT, arch/arm64/include/asm/thread_info.h */
	return task->thread_info.flags >> 22 & 1;
#endif
}

SEC("?raw_tp/sys_enter")
int raw_enter(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 nr = ctx->args[1];

	if (nr >= CALLS)
		return 0;
	if (native_calls[nr] == CALL_OPEN || compat_calls[nr] == CALL_OPEN)
		handle_enter_open();
	if (account_reads && (native_calls[nr] == CALL_READ || compat_calls[nr] == CALL_READ)) {
		struct called call = { .compat = is_compat(bpf_get_current_task_btf()) };

		if ((call.compat ? compat_calls[nr] : native_calls[nr]) == CALL_READ)
			handle_enter_read(&call);
	}
	return 0;
}

SEC("?raw_tp/sys_exit")
int raw_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);
	struct called call = { .ret = (long)ctx->args[1] };
	__u64 nr = syscall_nr(regs);
	enum call kind;

	if (nr >= CALLS || (!is_followed(native_calls[nr]) && !is_followed(compat_calls[nr])))
		return 0;
	call.compat = is_compat(task);
	kind = call.compat ? compat_calls[nr] : native_calls[nr];
	if (kind == CALL_READ)
		return account_reads ? handle_exit_read(&call) : 0;
	return handle_exit(kind, &call);
}

/* -- in every mode -- */

SEC("raw_tp/sched_process_fork")
int life_fork(struct bpf_raw_tracepoint_args *ctx)
{
	return handle_fork((struct task_struct *)ctx->args[0],
			   (struct task_struct *)ctx->args[1]);
}

SEC("raw_tp/sched_process_exec")
int life_exec(struct bpf_raw_tracepoint_args *ctx)
{
	return handle_exec((struct task_struct *)ctx->args[0], (__u32)ctx->args[1]);
}

SEC("raw_tp/sched_process_exit")
int life_exit(struct bpf_raw_tracepoint_args *ctx)
{
	return handle_thread_exit((struct task_struct *)ctx->args[0]);
}

/* Until 6.3 (request), before 5.19 (ring, request). */
const volatile __u32 uring_request = 0;

SEC("?raw_tp/io_uring_submit_sqe")
int uring_submit_sqe(struct bpf_raw_tracepoint_args *ctx)
{
	return handle_uring_submit((struct io_kiocb *)(uring_request ? ctx->args[1] :
								       ctx->args[0]));
}

/* From 6.4 on (kernel commit 2ad57931db64). */
SEC("?raw_tp/io_uring_submit_req")
int uring_submit_req(struct bpf_raw_tracepoint_args *ctx)
{
	return handle_uring_submit((struct io_kiocb *)ctx->args[0]);
}

SEC("?raw_tp/io_uring_complete")
int uring_complete(struct bpf_raw_tracepoint_args *ctx)
{
	return handle_uring_complete();
}

/* An operation that posts nothing when it succeeds (IOSQE_CQE_SKIP_SUCCESS) is done in these. */
SEC("?raw_tp/io_uring_task_work_run")
int uring_task_work_run(struct bpf_raw_tracepoint_args *ctx)
{
	/* A thread that polls runs none again and again. */
	return ctx->args[1] ? handle_uring_complete() : 0;
}

SEC("?raw_tp/io_uring_local_work_run")
int uring_local_work_run(struct bpf_raw_tracepoint_args *ctx)
{
	/* A thread that polls runs none again and again. */
	return ctx->args[1] ? handle_uring_complete() : 0;
}

/* Not attached: user space runs it with a struct vb_reconcile for a context. */
SEC("raw_tp")
int reconcile(struct bpf_raw_tracepoint_args *ctx)
{
	return handle_reconcile(ctx->args[0], ctx->args[1], ctx->args[2]);
}
