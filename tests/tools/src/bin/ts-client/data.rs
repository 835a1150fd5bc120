//! Loads the server with data that can be checked later, value by value, without being kept here.

use std::io::{self, Error};

use transship_testtools::pattern::Pattern;

use crate::connection::{Connection, Reply, command};

/// Requests sent before their replies are read.
const DEPTH: u64 = 64;

fn key(i: u64) -> String {
    format!("data:{i}")
}

/// Sets `values` values of `size` bytes.
pub fn fill(connection: &mut Connection, values: u64, size: usize) -> io::Result<()> {
    let mut value = vec![0; size];
    for i in 0..values {
        Pattern::new(i).fill(&mut value);
        connection.send(&command(&[b"SET", key(i).as_bytes(), &value]))?;
        if i >= DEPTH {
            expect_ok(connection)?;
        }
    }
    for _ in 0..values.min(DEPTH) {
        expect_ok(connection)?;
    }
    Ok(())
}

fn expect_ok(connection: &mut Connection) -> io::Result<()> {
    match connection.reply()? {
        Reply::Simple => Ok(()),
        other => Err(Error::other(format!("SET answered {other:?}"))),
    }
}

/// How many of the values are absent or not what [`fill`] set.
pub fn wrong(connection: &mut Connection, values: u64, size: usize) -> io::Result<u64> {
    let mut wrong = 0;
    for i in 0..values + DEPTH {
        if i < values {
            connection.send(&command(&[b"GET", key(i).as_bytes()]))?;
        }
        if let Some(i) = i.checked_sub(DEPTH).filter(|i| *i < values) {
            match connection.reply()? {
                Reply::Bulk(Some(v)) if v.len() == size && Pattern::new(i).wrong(&v) == 0 => {}
                _ => wrong += 1,
            }
        }
    }
    Ok(wrong)
}
