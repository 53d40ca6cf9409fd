//! A host that refuses system calls, for one thread.

/// Runs `test` on a thread of its own, which may call [`refuse`].
pub(crate) fn on_a_thread_of_its_own(test: impl FnOnce() + Send + 'static) {
    if let Err(panic) = std::thread::spawn(test).join() {
        std::panic::resume_unwind(panic);
    }
}

/// From now on these system calls fail with `errno`, on this thread and those it starts.
pub(crate) fn refuse(calls: &[libc::c_long], errno: i32) {
    // Of struct seccomp_data the first word is the number.
    let mut filter = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for (i, &call) in calls.iter().enumerate() {
        filter.push(libc::sock_filter {
            jt: u8::try_from(calls.len() - i).unwrap(),
            ..statement(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                u32::try_from(call).unwrap(),
            )
        });
    }
    let ret = libc::BPF_RET | libc::BPF_K;
    filter.push(statement(ret, libc::SECCOMP_RET_ALLOW));
    filter.push(statement(
        ret,
        libc::SECCOMP_RET_ERRNO | u32::try_from(errno).unwrap(),
    ));
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).unwrap(),
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program and its filter outlive the calls.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let rc = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        );
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    }
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: 0,
        jf: 0,
        k,
    }
}
