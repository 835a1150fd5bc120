//! Clients that misbehave: bytes that are no requests, connections that end in the middle of one, two creates of one container at once.
//! The others must not notice.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::{
    api,
    protobuf::Message,
    shim_async::{Client, Task, TaskClient},
    ttrpc::{
        Request,
        asynchronous::{Server, transport::Listener},
        context,
    },
};
use tokio::time::{sleep, timeout};

use crate::{
    server::services,
    tests::{Bed, call},
};

const REQUEST: u8 = 1;

/// The bed's service on a socket.
async fn serve(bed: &Bed) -> (PathBuf, Server) {
    let socket = bed.path("task");
    let listener = Listener::try_from(UnixListener::bind(&socket).unwrap()).unwrap();
    let mut server = Server::new().add_listener(listener);
    for (name, methods) in services(Arc::new(bed.service.clone())) {
        server = server.register_service([(name, methods)].into());
    }
    server.start().await.unwrap();
    (socket, server)
}

/// A message as it is on the wire: length, stream, kind, flags, payload.
fn message(length: u32, stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, 0], payload].concat()
}

fn request(method: &str, payload: &impl Message) -> Vec<u8> {
    let request = Request {
        service: "containerd.task.v2.Task".into(),
        method: method.into(),
        payload: payload.write_to_bytes().unwrap(),
        ..Default::default()
    };
    let bytes = request.write_to_bytes().unwrap();
    message(bytes.len() as u32, 1, REQUEST, &bytes)
}

/// Says this and hangs up, perhaps after a look at the answer.
async fn say(socket: &Path, bytes: Vec<u8>) {
    let socket = socket.to_owned();
    let talk = move || {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        // the server may have hung up already
        let _ = stream.write_all(&bytes);
        let _ = stream.read(&mut [0; 64]);
    };
    tokio::task::spawn_blocking(talk).await.unwrap();
}

async fn answers(client: &TaskClient) -> api::StateResponse {
    let state = api::StateRequest { id: "c1".into(), ..Default::default() };
    let answer = timeout(Duration::from_secs(5), client.state(context::with_timeout(0), &state)).await;
    answer.expect("an answer in time").expect("a state")
}

#[tokio::test]
async fn rubbish_hurts_nobody() {
    let bed = Bed::new().await;
    bed.create().await;
    let (socket, _server) = serve(&bed).await;
    let good = TaskClient::new(Client::connect(&format!("unix://{}", socket.display())).await.unwrap());
    answers(&good).await;
    let garbage: Vec<u8> = (0..70_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let state = api::StateRequest { id: "c1".into(), ..Default::default() };
    let whole = request("State", &state);
    for bytes in [
        Vec::new(),
        garbage.clone(),
        whole[..4].to_vec(),
        whole[..whole.len() - 1].to_vec(),
        message(u32::MAX, 1, REQUEST, &garbage),
        message(garbage.len() as u32, 1, REQUEST, &garbage),
        message(0, 1, REQUEST, &[]),
        message(0, 2, REQUEST, &[]),
        message(0, 1, 2, &[]),
        message(0, 1, 3, &[]),
        message(0, 1, 77, &[]),
        request("NoSuchMethod", &state),
        request("Start", &api::StartRequest { id: "no such".into(), ..Default::default() }),
        request(
            "Exec",
            &api::ExecProcessRequest { id: "c1".into(), exec_id: "../x".into(), ..Default::default() },
        ),
    ] {
        say(&socket, bytes).await;
        assert_eq!(answers(&good).await.id, "c1");
    }
    // many who say nothing
    let idle: Vec<_> = (0..200).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    assert_eq!(answers(&good).await.id, "c1");
    drop(idle);
    assert_eq!(answers(&good).await.id, "c1");
}

/// containerd that is killed in the middle of a call: what it asked for is done all the same.
#[tokio::test]
async fn a_call_goes_on_without_its_caller() {
    let mut bed = Bed::new().await;
    bed.create().await;
    let (socket, _server) = serve(&bed).await;
    fs::write(bed.path("slow-start"), "").unwrap();
    say(&socket, request("Start", &api::StartRequest { id: "c1".into(), ..Default::default() })).await;
    assert_eq!(bed.events(2).await, ["create", "start"]);
    // nor does one who waited and went matter to the others
    say(&socket, request("Wait", &api::WaitRequest { id: "c1".into(), ..Default::default() })).await;
    let kill = api::KillRequest { id: "c1".into(), signal: 9, ..Default::default() };
    bed.service.kill(&call(), kill).await.unwrap();
    assert_eq!(bed.events(1).await, ["exit c1"]);
}

#[tokio::test]
async fn one_of_two_creates_is_refused() {
    let bed = Bed::new().await;
    fs::write(bed.path("slow-create"), "").unwrap();
    bed.prepare_process("sleep 60");
    let (service, context, first) = (bed.service.clone(), call(), bed.request());
    let first = tokio::spawn(async move { service.create(&context, first).await });
    sleep(Duration::from_millis(100)).await;
    let second = bed.service.create(&call(), bed.request()).await.unwrap_err();
    assert!(second.to_string().contains("already exists"), "{second}");
    first.await.unwrap().unwrap();
    assert_eq!(bed.state().await.id, "c1");
}
