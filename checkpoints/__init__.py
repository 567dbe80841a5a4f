"""Checkpoints: conversion from and to other formats, and post-training."""
