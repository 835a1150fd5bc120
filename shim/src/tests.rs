//! The service driven as containerd drives it, over a fake runc: no root, no containers, real events.
//!
//! The fake's "containers" are children that the test has started beforehand (their pids wait in files): the reaper sees only
//! children of its own thread, and a test is no child subreaper.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api,
    events::task::TaskExit,
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim::{event::Envelope, events::ForwardRequest, oci::Options},
    shim_async::{Events, Task, create_events},
    ttrpc::{
        self, Code,
        r#async::TtrpcContext,
        asynchronous::{Server, transport::Listener},
    },
};
use tokio::{runtime::Handle, sync::mpsc, time::timeout};

use crate::{
    container::Shared,
    events::Publisher,
    hooks::NoHooks,
    io::{ProcessIo, StdioConfig},
    lifecycle,
    reaper::Reaper,
    service::Service,
    state::State,
};

/// Takes runc's command lines: notes the verb and its last arguments in `calls`, fails as the file `fail-VERB` says, takes its time if
/// there is a file `slow-VERB`, notes its umask in `umask-VERB`, hands out the pids that lie in `next-pid`, and signals for real.
const FAKE_RUNC: &str = r#"#!/bin/sh
D=$(dirname "$0"); LOG=
while :; do case $1 in --root|--log-format) shift 2;; --log) LOG=$2; shift 2;; --*) shift;; *) break;; esac; done
V=$1; shift; echo "$V $*" >> $D/calls
PIDFILE=; WORK=; IDFILE=$D/pid
for a; do case $p in --pid-file) PIDFILE=$a;; --work-path) WORK=$a;; esac; p=$a; done
if [ -e $D/fail-$V ]; then
  [ "$V" != checkpoint ] || { mkdir -p $WORK; echo "(0.1) Error (criu/x.c:7): cannot dump" > $WORK/dump.log; }
  echo "{\"level\":\"error\",\"msg\":\"$(cat $D/fail-$V)\"}" >> $LOG; cat $D/fail-$V >&2; exit 1
fi
take() { head -n1 $D/next-pid > $PIDFILE.n; sed -i 1d $D/next-pid; mv $PIDFILE.n $PIDFILE; }
[ ! -e $D/slow-$V ] || sleep 0.5
umask > $D/umask-$V
case $V in
create|restore) take; cp $PIDFILE $IDFILE;;
exec) take;;
start) [ ! -e $D/die-on-start ] || { kill -9 $(cat $IDFILE); sleep 0.2; };;
kill) [ "$1" != --all ] || { shift; exit 0; }; kill -$2 $(cat $IDFILE) 2>/dev/null || { echo "container not running" >&2; exit 1; };;
ps) echo "[$(cat $IDFILE)]";;
esac
"#;

/// Private pid namespace: the end of init is the end of all, nothing else has to be killed.
const CONFIG: &str = r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"pid"}]}}"#;

struct Daemon(mpsc::UnboundedSender<Envelope>);

#[async_trait]
impl Events for Daemon {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<api::Empty> {
        let _ = self.0.send(request.envelope.unwrap());
        Ok(api::Empty::default())
    }
}

/// A service, its fake runc and its fake containerd.
pub(crate) struct Bed {
    dir: tempfile::TempDir,
    pub(crate) service: Service,
    shared: Shared,
    events: mpsc::UnboundedReceiver<Envelope>,
    _daemon: Server,
}

pub(crate) fn call() -> TtrpcContext {
    TtrpcContext {
        mh: Default::default(),
        metadata: Default::default(),
        timeout_nano: 0,
        connection_data: Default::default(),
    }
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("not a status: {other}"),
    }
}

fn text<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> String {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.message,
        other => panic!("not a status: {other}"),
    }
}

impl Bed {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runc = dir.path().join("runc");
        fs::write(&runc, FAKE_RUNC).unwrap();
        fs::set_permissions(&runc, fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("bundle")).unwrap();
        fs::write(dir.path().join("bundle/config.json"), CONFIG).unwrap();
        fs::write(dir.path().join("next-pid"), "").unwrap();
        let socket = dir.path().join("ttrpc");
        let (seen, events) = mpsc::unbounded_channel();
        let listener = Listener::try_from(UnixListener::bind(&socket).unwrap()).unwrap();
        let mut daemon =
            Server::new().add_listener(listener).register_service(create_events(Arc::new(Daemon(seen))));
        daemon.start().await.unwrap();
        let shared = Shared {
            namespace: "test".into(),
            reaper: Reaper::start().unwrap(),
            events: Arc::new(Publisher::new(socket.to_str().unwrap(), "test")),
            runtime: Handle::current(),
            unvetted: dir.path().join("unvetted"),
        };
        let service = Service::new(shared.clone(), Arc::new(NoHooks));
        Self { dir, service, shared, events, _daemon: daemon }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn bundle(&self) -> PathBuf {
        self.path("bundle")
    }

    /// Starts a process for the next create, restore or exec to find.
    pub(crate) fn prepare_process(&self, script: &str) -> u32 {
        #[expect(clippy::zombie_processes, reason = "the reaper under test waits for it")]
        let child = Command::new("sh").args(["-c", script]).stdin(Stdio::null()).spawn().unwrap();
        let old = fs::read_to_string(self.path("next-pid")).unwrap();
        fs::write(self.path("next-pid"), format!("{old}{}\n", child.id())).unwrap();
        child.id()
    }

    pub(crate) fn request(&self) -> api::CreateTaskRequest {
        let options = Options { binary_name: self.path("runc").display().to_string(), ..Default::default() };
        api::CreateTaskRequest {
            id: "c1".into(),
            bundle: self.bundle().display().to_string(),
            options: MessageField::some(Any {
                type_url: "containerd.runc.v1.Options".into(),
                value: options.write_to_bytes().unwrap(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub(crate) async fn create(&self) -> u32 {
        self.prepare_process("sleep 60");
        self.service.create(&call(), self.request()).await.unwrap().pid
    }

    async fn start(&self, exec_id: &str) -> ttrpc::Result<u32> {
        let r = api::StartRequest { id: "c1".into(), exec_id: exec_id.into(), ..Default::default() };
        self.service.start(&call(), r).await.map(|r| r.pid)
    }

    async fn kill(&self, exec_id: &str) -> ttrpc::Result<api::Empty> {
        let r =
            api::KillRequest { id: "c1".into(), exec_id: exec_id.into(), signal: 9, ..Default::default() };
        self.service.kill(&call(), r).await
    }

    async fn delete(&self, exec_id: &str) -> ttrpc::Result<api::DeleteResponse> {
        let r = api::DeleteRequest { id: "c1".into(), exec_id: exec_id.into(), ..Default::default() };
        self.service.delete(&call(), r).await
    }

    async fn wait(&self, exec_id: &str) -> u32 {
        let r = api::WaitRequest { id: "c1".into(), exec_id: exec_id.into(), ..Default::default() };
        let answer = timeout(Duration::from_secs(10), self.service.wait(&call(), r)).await;
        answer.expect("the wait ends").unwrap().exit_status
    }

    async fn exec(&self, exec_id: &str) -> ttrpc::Result<api::Empty> {
        let spec = Any { value: br#"{"args":["x"],"cwd":"/"}"#.to_vec(), ..Default::default() };
        let r = api::ExecProcessRequest {
            id: "c1".into(),
            exec_id: exec_id.into(),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.service.exec(&call(), r).await
    }

    pub(crate) async fn state(&self) -> api::StateResponse {
        let r = api::StateRequest { id: "c1".into(), ..Default::default() };
        self.service.state(&call(), r).await.unwrap()
    }

    /// The next `n` events: their topics, exits with the id of what ended.
    pub(crate) async fn events(&mut self, n: usize) -> Vec<String> {
        let mut seen = Vec::new();
        while seen.len() < n {
            let next = timeout(Duration::from_secs(10), self.events.recv()).await;
            let e = next.unwrap_or_else(|_| panic!("only {seen:?} came")).unwrap();
            let topic = e.topic.trim_start_matches("/tasks/").to_string();
            seen.push(match topic.as_str() {
                "exit" => format!("exit {}", TaskExit::parse_from_bytes(&e.event.value).unwrap().id),
                _ => topic,
            });
        }
        seen
    }

    fn calls(&self) -> String {
        fs::read_to_string(self.path("calls")).unwrap_or_default()
    }

    fn fail(&self, verb: &str, why: &str) {
        fs::write(self.path(&format!("fail-{verb}")), why).unwrap();
    }
}

#[tokio::test]
async fn a_whole_life_in_order() {
    let mut bed = Bed::new().await;
    let pid = bed.create().await;
    assert_eq!(bed.state().await.status.enum_value_or_default(), api::Status::CREATED);
    assert_eq!(bed.start("").await.unwrap(), pid);
    assert_eq!(bed.state().await.status.enum_value_or_default(), api::Status::RUNNING);
    assert_eq!(code(bed.start("").await), Code::UNKNOWN);
    assert!(text(bed.delete("").await).contains("cannot delete a running process"));
    assert_eq!(code(bed.service.create(&call(), bed.request()).await), Code::ALREADY_EXISTS);
    bed.kill("").await.unwrap();
    assert_eq!(bed.wait("").await, 137);
    assert_eq!(bed.wait("").await, 137, "a late waiter sees it as well");
    assert_eq!(code(bed.kill("").await), Code::NOT_FOUND);
    assert_eq!(text(bed.start("").await), "cannot start a stopped process");
    let deleted = bed.delete("").await.unwrap();
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 137));
    assert!(deleted.exited_at.seconds > 1_600_000_000);
    assert_eq!(code(bed.delete("").await), Code::NOT_FOUND);
    assert_eq!(bed.events(4).await, ["create", "start", "exit c1", "delete"]);
    assert!(!bed.calls().contains("--all"), "a private pid namespace needs no kill of all");
}

#[tokio::test]
async fn an_exit_during_start_is_told_after_it() {
    let mut bed = Bed::new().await;
    bed.create().await;
    fs::write(bed.path("die-on-start"), "").unwrap();
    bed.start("").await.unwrap();
    assert_eq!(bed.events(3).await, ["create", "start", "exit c1"]);
}

#[tokio::test]
async fn inits_exit_comes_after_those_of_the_execs() {
    let mut bed = Bed::new().await;
    bed.create().await;
    bed.start("").await.unwrap();
    bed.exec("e1").await.unwrap();
    assert_eq!(code(bed.exec("e1").await), Code::ALREADY_EXISTS);
    assert_eq!(code(bed.exec("../e").await), Code::INVALID_ARGUMENT);
    assert_eq!(code(bed.kill("e1").await), Code::FAILED_PRECONDITION, "it does not run yet");
    assert_eq!(code(bed.start("nobody").await), Code::NOT_FOUND);
    bed.prepare_process("sleep 60");
    bed.start("e1").await.unwrap();
    bed.exec("late").await.unwrap();
    bed.kill("").await.unwrap();
    // The reaper has to see it first.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(code(bed.start("late").await), Code::FAILED_PRECONDITION);
    bed.kill("e1").await.unwrap();
    assert_eq!(bed.wait("e1").await, 137);
    assert_eq!(code(bed.kill("e1").await), Code::NOT_FOUND);
    let all = ["create", "start", "exec-added", "exec-started", "exec-added", "exit e1", "exit c1"];
    assert_eq!(bed.events(all.len()).await, all);
    bed.delete("e1").await.unwrap();
    assert_eq!(code(bed.delete("e1").await), Code::NOT_FOUND);
    bed.delete("").await.unwrap();
}

#[tokio::test]
async fn a_failed_exec_ends_its_waiters_and_does_not_hold_up_init() {
    let mut bed = Bed::new().await;
    bed.create().await;
    bed.start("").await.unwrap();
    bed.exec("e1").await.unwrap();
    bed.fail("exec", "no such program");
    assert_eq!(text(bed.start("e1").await), "OCI runtime exec failed: no such program");
    assert_eq!(bed.wait("e1").await, 0);
    bed.kill("").await.unwrap();
    assert_eq!(bed.events(4).await, ["create", "start", "exec-added", "exit c1"]);
}

#[tokio::test]
async fn without_a_private_pid_namespace_all_are_killed() {
    let mut bed = Bed::new().await;
    fs::write(bed.bundle().join("config.json"), "{}").unwrap();
    bed.create().await;
    bed.start("").await.unwrap();
    bed.kill("").await.unwrap();
    bed.events(3).await;
    assert!(bed.calls().contains("kill --all c1 9"), "{}", bed.calls());
}

#[tokio::test]
async fn a_failed_create_says_why_and_leaves_nothing() {
    let bed = Bed::new().await;
    bed.fail("create", "exec format error");
    let why = text(bed.service.create(&call(), bed.request()).await);
    assert_eq!(why, "OCI runtime create failed: exec format error");
    let r = api::StateRequest { id: "c1".into(), ..Default::default() };
    assert_eq!(code(bed.service.state(&call(), r).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn pause_and_resume() {
    let mut bed = Bed::new().await;
    bed.create().await;
    bed.start("").await.unwrap();
    let pause = || api::PauseRequest { id: "c1".into(), ..Default::default() };
    bed.service.pause(&call(), pause()).await.unwrap();
    assert_eq!(bed.state().await.status.enum_value_or_default(), api::Status::PAUSED);
    assert!(text(bed.service.pause(&call(), pause()).await).contains("cannot pause a paused container"));
    assert!(text(bed.exec("e1").await).contains("cannot exec in a paused state"));
    let resume = api::ResumeRequest { id: "c1".into(), ..Default::default() };
    bed.service.resume(&call(), resume).await.unwrap();
    assert_eq!(bed.events(4).await, ["create", "start", "paused", "resumed"]);
    // Killed while paused: runc is asked to thaw what is left.
    bed.service.pause(&call(), pause()).await.unwrap();
    bed.kill("").await.unwrap();
    assert_eq!(bed.wait("").await, 137);
    assert_eq!(bed.calls().matches("resume c1").count(), 2);
}

#[tokio::test]
async fn a_checkpoint_shows_crius_own_reason() {
    let mut bed = Bed::new().await;
    bed.create().await;
    bed.start("").await.unwrap();
    let path = bed.path("images").display().to_string();
    let request = || api::CheckpointTaskRequest { id: "c1".into(), path: path.clone(), ..Default::default() };
    bed.fail("checkpoint", "criu failed: type NOTIFY errno 0");
    let why = text(bed.service.checkpoint(&call(), request()).await);
    assert!(why.contains("Error (criu/x.c:7): cannot dump"), "{why}");
    assert!(why.contains("criu-dump.log") && bed.bundle().join("criu-dump.log").exists());
    fs::remove_file(bed.path("fail-checkpoint")).unwrap();
    bed.service.checkpoint(&call(), request()).await.unwrap();
    assert!(bed.calls().contains("--leave-running c1"), "no options mean: leave it running");
    // CRIU would make images for everybody; what runc makes for a container is as it was
    let umask = |verb: &str| fs::read_to_string(bed.path(&format!("umask-{verb}"))).unwrap();
    assert_eq!(umask("checkpoint").trim(), "0077");
    let own = fs::read_to_string("/proc/self/status").unwrap();
    assert!(own.contains(&format!("Umask:\t{}", umask("start").trim())), "{own}");
    assert_eq!(bed.events(3).await, ["create", "start", "checkpointed"]);
}

#[tokio::test]
async fn created_from_a_checkpoint_it_is_restored_at_start() {
    let mut bed = Bed::new().await;
    let request = api::CreateTaskRequest { checkpoint: "/images".into(), ..bed.request() };
    assert_eq!(bed.service.create(&call(), request).await.unwrap().pid, 0);
    assert_eq!(bed.state().await.status.enum_value_or_default(), api::Status::CREATED);
    assert!(!bed.calls().contains("create"));
    // there are no images that could be looked at
    assert!(text(bed.start("").await).contains("the checkpoint in /images is refused"));
    assert!(!bed.calls().contains("restore"));
    fs::write(bed.path("unvetted"), "test/c1\n").unwrap();
    bed.fail("restore", "criu failed");
    assert!(text(bed.start("").await).contains("OCI runtime restore failed: criu failed"));
    fs::remove_file(bed.path("fail-restore")).unwrap();
    let pid = bed.prepare_process("sleep 60");
    assert_eq!(bed.start("").await.unwrap(), pid);
    assert!(bed.calls().contains("--image-path /images"));
    bed.kill("").await.unwrap();
    assert_eq!(bed.wait("").await, 137);
    assert_eq!(bed.events(3).await, ["create", "start", "exit c1"]);
}

#[tokio::test]
async fn what_is_being_moved_refuses_and_obeys_afterwards() {
    let bed = Bed::new().await;
    bed.create().await;
    let container = bed.service.container("c1").unwrap();
    assert!(container.begin_move().await.is_err(), "it does not run yet");
    bed.start("").await.unwrap();
    let moving = container.begin_move().await.unwrap();
    assert!(container.begin_move().await.is_err());
    assert_eq!(code(bed.kill("").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(bed.exec("e1").await), Code::FAILED_PRECONDITION);
    let pause = api::PauseRequest { id: "c1".into(), ..Default::default() };
    assert_eq!(code(bed.service.pause(&call(), pause).await), Code::FAILED_PRECONDITION);
    drop(moving);
    bed.kill("").await.unwrap();
    assert_eq!(bed.wait("").await, 137);
}

#[tokio::test]
async fn an_arrival_is_announced_by_start_and_ends_after_it() {
    let mut bed = Bed::new().await;
    let marker = bed.path("marker.json");
    fs::write(&marker, "{}").unwrap();
    let created = lifecycle::create(&bed.request(), Some(marker.clone()), bed.shared.clone()).await.unwrap();
    let container = created.container;
    assert!(created.watch.is_none() && bed.calls().is_empty());
    assert_eq!(container.start().await.unwrap_err().code(), Code::FAILED_PRECONDITION);

    let since = bed.shared.reaper.mark();
    let pid = bed.prepare_process("exit 3");
    let (io, _child) = open_null().await;
    container.adopt_restored(pid, io.clone(), since).unwrap();
    assert!(container.adopt_restored(pid, io, since).is_err());
    assert_eq!(container.init.state(), State::Running);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(container.init.exited().is_none(), "its exit waits for the start");
    assert_eq!(container.start().await.unwrap(), pid);
    assert_eq!(container.init.wait().await.status, 3);
    assert_eq!(bed.events(2).await, ["start", "exit c1"]);
    container.delete(|| ()).await.unwrap();
    assert!(!marker.exists());
}

async fn open_null() -> (Arc<ProcessIo>, crate::io::ChildStdio) {
    let spawn = |_: Command| anyhow::bail!("no program is asked for");
    let context = crate::io::Context { namespace: "test", id: "c1", owner: None, spawn: &spawn, held: false };
    ProcessIo::open(&StdioConfig::default(), &context).await.unwrap()
}

#[tokio::test]
async fn shutdown_waits_for_the_last_container() {
    let bed = Bed::new().await;
    bed.create().await;
    bed.service.shutdown(&call(), api::ShutdownRequest::default()).await.unwrap();
    let down = bed.service.wait_shutdown();
    assert!(timeout(Duration::from_millis(20), down).await.is_err());
    bed.kill("").await.unwrap();
    bed.wait("").await;
    bed.delete("").await.unwrap();
    bed.service.shutdown(&call(), api::ShutdownRequest::default()).await.unwrap();
    timeout(Duration::from_secs(1), bed.service.wait_shutdown()).await.unwrap();
}
