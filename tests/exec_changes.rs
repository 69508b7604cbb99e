//! `exec` while clips change, are evicted and renamed: on file systems with
//! reflinks and without.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::clips::{CLIP, MIB, cache_file};
use common::exec::*;
use common::snapshots::{QUICK, WHOLE, each_place};
use common::{content, put};

/// What the shell's `cat` gave, between what the script has printed.
fn parts(done: &Done, size: usize) -> Vec<&[u8]> {
    done.stdout.chunks(size).collect()
}

#[test]
fn a_slow_reader_sees_its_version_to_the_end() {
    each_place(WHOLE, QUICK, |rig, kind| {
        let (old, new) = (content(1, 8 * MIB), content(6, 17 * MIB));
        put(rig.folder(), "new", &new);
        // One holds the clip through FUSE: rclone then writes the new one into the
        // old cache file. Others open it again and again.
        let script = format!(
            "f=open('clip','rb'); got=f.read(1000); m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)\n\
             old=open('clip','rb').read(); held=os.open('clip',os.O_RDONLY|os.O_DIRECT); os.pread(held,16,0)\n\
             new=open('{0}','rb').read(); open('{1}','wb').write(new); os.utime('{1}',(2e9,2e9))\n\
             kids=[]\n\
             for i in range(3):\n\
             \x20kids.append(os.fork())\n\
             \x20if kids[-1]==0:\n\
             \x20 while True:\n\
             \x20  if open('clip','rb').read()==new: os._exit(0)\n\
             \x20  time.sleep(.05)\n\
             bad=0\n\
             while kids:\n\
             \x20if m[:]!=old: bad|=1\n\
             \x20if os.pread(f.fileno(),len(old),0)!=old: bad|=2\n\
             \x20pid,status=os.waitpid(kids[-1],os.WNOHANG)\n\
             \x20if pid: kids.pop(); bad|=4*(status!=0)\n\
             \x20time.sleep(.05)\n\
             got+=f.read(); sys.stdout.buffer.write(got); sys.stdout.flush()\n\
             os.close(held); bad|=8*(m[:]!=old); bad|=16*(open('clip','rb').read()!=new)\n\
             sys.exit(bad)",
            rig.folder().join("new").display(),
            rig.source().join(CLIP).display()
        );
        let done = run_in(&rig.mountpoint(), &[], &python(&script));
        assert_eq!(done.code, Some(0), "{}\n{}", done.stderr, done.report);
        assert!(done.stdout == old, "the old version, whole");
        assert!(
            done.report["kinds"][kind.name()].as_u64() >= Some(2),
            "{}",
            done.report
        );
    });
}

#[test]
fn evicted_and_renamed_clips_are_read_as_fuse_shows_them() {
    each_place(WHOLE, QUICK, |rig, _| {
        let mount = rig.mountpoint();
        let old = content(1, 8 * MIB);
        // Evicted between two opens, the first of which goes on.
        let [data, metadata] = ["vfs", "vfsMeta"].map(|tree| cache_file(rig, tree, CLIP));
        let script = format!(
            "exec 3< clip; cat clip; rm {} {}; cat <&3; cat clip",
            data.display(),
            metadata.display()
        );
        let done = run_in(&mount, &[], &["bash", "-c", &script]);
        assert!(parts(&done, old.len()) == [&old[..]; 3], "{}", done.stderr);
        assert_eq!(done.substituted(), 2, "{}", done.report);
        assert_eq!(done.reason("no_metadata"), 1, "{}", done.report);
        rig.unmount();
        rig.mount().unwrap();
        // Renamed at the remote, and another in its place.
        rig.cache_whole(Path::new(CLIP)).unwrap();
        let (source, new) = (rig.source(), content(3, 8 * MIB));
        put(rig.folder(), "new", &new);
        let script = format!(
            "exec 3< clip; cat clip; cd {}; mv clip other; touch -d 2031-01-01 ../new; mv ../new clip; cd {}; \
             until [ -e other ] && [ clip -nt other ]; do sleep .1; done; cat <&3; cat other; cat clip",
            source.display(),
            mount.display()
        );
        let done = run_in(&mount, &[], &["bash", "-c", &script]);
        assert!(
            parts(&done, old.len()) == [&old[..], &old, &old, &new],
            "{}",
            done.stderr
        );
        assert_eq!(done.substituted(), 2, "{}", done.report);
        assert!(fs::read(mount.join(CLIP)).unwrap() == new);
    });
}
